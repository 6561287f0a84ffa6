"""All verbs, as one click group."""

import click

from onionskin.cli import (
    bench,
    byte_ranges,
    check,
    compare,
    exchange,
    exit_status,
    forking,
    keeping,
    map,
    serve,
    snapshots,
    verbs,
    volumes,
)

__all__ = ["onionskin"]

_HELP = ["-h", "--help"]
_SECTIONS = {
    "Volumes": (
        *(volumes.create, volumes.clone, volumes.flatten, volumes.resize, volumes.rename, volumes.relocate),
        volumes.delete,
    ),
    "Many copies": (forking.fork, forking.forks, forking.lineage, forking.expire),
    "Snapshots": (snapshots.snapshot, snapshots.snapshots, snapshots.revert, snapshots.discard, snapshots.merge),
    "Keep snapshots, and how long": (keeping.hold, keeping.unhold, keeping.holds, keeping.note, keeping.prune),
    "Look": (
        *(volumes.tree, volumes.list_volumes, volumes.info, snapshots.usage, snapshots.diff, compare.compare),
        map.map_,
    ),
    "Images and streams": (exchange.import_, exchange.export, exchange.delta, exchange.apply),
    "Bytes of a disk": (byte_ranges.read, byte_ranges.write, byte_ranges.trim, byte_ranges.zero),
    "Serve and mount": (serve.serve, serve.stats, serve.mount, serve.umount),
    "Stores and this program": (check.check, check.demo, bench.bench, check.completion, verbs.help_),
}


@click.group(
    cls=exit_status.Verbs,
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


for _section, _verbs in _SECTIONS.items():
    for _verb in _verbs:
        onionskin.add_command(_verb)
        # Said of each, and not left to the group: click keeps the option that it made first, also without the group.
        _verb.context_settings.setdefault("help_option_names", _HELP)
        verbs.SECTION_OF[_verb.name or ""] = _section
