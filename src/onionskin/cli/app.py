"""All verbs, as one click group.

What must hold: a command line imports the module of its own verb alone. A verb is a process of its own, and most of what
a short one costs would be imports that it does not need.
"""

import importlib
from collections.abc import Iterator, MutableMapping

import click

from onionskin.cli import exit_status, verbs

__all__ = ["onionskin"]

_HELP = ["-h", "--help"]
# By their sections: the verbs, and the module of onionskin.cli and the name in it of each.
_SECTIONS = {
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
        "snapshots": "snapshots.snapshots",
        "revert": "snapshots.revert",
        "discard": "snapshots.discard",
        "merge": "snapshots.merge",
    },
    "Keep snapshots, and how long": {
        "hold": "keeping.hold",
        "unhold": "keeping.unhold",
        "holds": "keeping.holds",
        "note": "keeping.note",
        "prune": "keeping.prune",
    },
    "Look": {
        "tree": "volumes.tree",
        "list": "volumes.list_volumes",
        "info": "volumes.info",
        "usage": "snapshots.usage",
        "diff": "snapshots.diff",
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
_HOME = {verb: home for homes in _SECTIONS.values() for verb, home in homes.items()}
verbs.SECTION_OF.update({verb: section for section, homes in _SECTIONS.items() for verb in homes})


class _Commands(MutableMapping[str, click.Command]):
    """The commands of the group by their verbs. The module of a command is imported when it is first asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, verb: str) -> click.Command:
        if verb not in self._loaded:
            module, attribute = _HOME[verb].split(".")
            command: click.Command = getattr(importlib.import_module(f"onionskin.cli.{module}"), attribute)
            # Said of each, and not left to the group: click keeps the option that it made first, also without the group.
            command.context_settings.setdefault("help_option_names", _HELP)
            self._loaded[verb] = command
        return self._loaded[verb]

    def __contains__(self, verb: object) -> bool:
        return verb in _HOME

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)

    def __setitem__(self, verb: str, command: click.Command) -> None:
        raise TypeError(f"the verb {verb} cannot be set: add it to the sections above")

    def __delitem__(self, verb: str) -> None:
        raise TypeError(f"the verb {verb} cannot be removed")


@click.group(
    cls=exit_status.Verbs,
    commands=_Commands(),
    epilog=exit_status.EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": _HELP},
)
@click.version_option(package_name="onionskin", message="onionskin %(version)s")
@click.pass_context
def onionskin(ctx: click.Context) -> None:
    """Copy-on-write snapshots of virtual disks: snapshot, revert, merge, discard, clone."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(exit_status.USAGE)
