"""All verbs, as one click group."""

import click

from onionskin.cli import bench, byte_ranges, check, exchange, exit_status, keeping, map, serve, snapshots, volumes

__all__ = ["onionskin"]

_VERBS = (
    *(volumes.create, volumes.tree, volumes.list_volumes, volumes.info),
    *(snapshots.snapshot, snapshots.snapshots, snapshots.revert, snapshots.discard, snapshots.merge),
    *(volumes.clone, volumes.flatten, volumes.resize, volumes.rename, volumes.relocate, volumes.delete),
    *(snapshots.diff, snapshots.usage, map.map_),
    *(keeping.hold, keeping.unhold, keeping.holds, keeping.note, keeping.prune),
    *(exchange.import_, exchange.export, exchange.delta, exchange.apply),
    *(byte_ranges.read, byte_ranges.write, byte_ranges.trim, byte_ranges.zero),
    *(serve.serve, serve.stats, serve.mount, serve.umount),
    *(check.check, check.demo, bench.bench, check.completion),
)


@click.group(cls=exit_status.Verbs, epilog=exit_status.EPILOG, invoke_without_command=True)
@click.version_option(package_name="onionskin", message="onionskin %(version)s")
@click.pass_context
def onionskin(ctx: click.Context) -> None:
    """Copy-on-write snapshots of virtual disks: snapshot, revert, merge, discard, clone."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(exit_status.USAGE)


for _verb in _VERBS:
    onionskin.add_command(_verb)
