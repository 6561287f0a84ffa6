"""All verbs, as one click group."""

import click

from onionskin.cli import bench, data, pictures, serving, snapshots, statuses, transfer, upkeep, volumes

__all__ = ["onionskin"]

_VERBS = (
    *(volumes.create, volumes.tree, volumes.list_volumes, volumes.info),
    *(snapshots.snapshot, snapshots.snapshots, snapshots.revert, snapshots.discard, snapshots.merge),
    *(volumes.clone, volumes.flatten, volumes.resize, volumes.rename, volumes.relocate, volumes.delete),
    *(snapshots.diff, snapshots.usage, pictures.map_),
    *(transfer.import_, transfer.export, transfer.delta, transfer.apply),
    *(data.read, data.write, data.trim, data.zero),
    *(serving.serve, serving.stats, serving.mount, serving.umount),
    *(upkeep.check, upkeep.demo, bench.bench, upkeep.completion),
)


@click.group(cls=statuses.Verbs, epilog=statuses.EPILOG, invoke_without_command=True)
@click.version_option(package_name="onionskin", message="onionskin %(version)s")
@click.pass_context
def onionskin(ctx: click.Context) -> None:
    """Copy-on-write snapshots of virtual disks: snapshot, revert, merge, discard, clone."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(statuses.USAGE)


for _verb in _VERBS:
    onionskin.add_command(_verb)
