"""What the verbs are for: the sections of --help, and of the manual."""

# By their sections: the verbs, and the module of onionskin.cli and the name in it of each.
SECTIONS = {
    "Volumes": {
        "create": "volumes.create",
        "clone": "volumes.clone",
        "flatten": "volumes.flatten",
        "resize": "volumes.resize",
        "rename": "volumes.rename",
        "relocate": "volumes.relocate",
        "delete": "volumes.delete",
        "set": "properties.set_",
        "get": "properties.get",
    },
    "Many copies": {
        "fork": "forking.fork",
        "forks": "forking.forks",
        "lineage": "forking.lineage",
        "expire": "forking.expire",
    },
    "Snapshots": {
        "snapshot": "snapshots.snapshot",
        "snapshots": "listing.snapshots",
        "revert": "dropping.revert",
        "discard": "dropping.discard",
        "merge": "dropping.merge",
    },
    "Keep snapshots, and how long": {
        "hold": "keeping.hold",
        "unhold": "keeping.unhold",
        "holds": "keeping.holds",
        "note": "keeping.note",
        "prune": "keeping.prune",
    },
    "Look": {
        "tree": "describing.tree",
        "list": "listing.list_volumes",
        "info": "describing.info",
        "usage": "differences.usage",
        "diff": "differences.diff",
        "compare": "compare.compare",
        "map": "map.map_",
    },
    "Images and streams": {
        "import": "exchange.import_",
        "export": "exchange.export",
        "delta": "exchange.delta",
        "apply": "exchange.apply",
    },
    "Bytes of a disk": {
        "read": "byte_ranges.read",
        "write": "byte_ranges.write",
        "trim": "byte_ranges.trim",
        "zero": "byte_ranges.zero",
    },
    "Machines": {
        "machine": "machine.machine",
    },
    "Serve and mount": {
        "serve": "serve.serve",
        "stats": "serve.stats",
        "mount": "serve.mount",
        "umount": "serve.umount",
    },
    "Stores and this program": {
        "check": "check.check",
        "demo": "check.demo",
        "bench": "bench.bench",
        "completion": "check.completion",
        "help": "verbs.help_",
    },
}
SECTION_OF = {verb: section for section, homes in SECTIONS.items() for verb in homes}
