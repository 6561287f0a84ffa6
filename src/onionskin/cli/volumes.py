"""The verbs for whole volumes: create, clone, flatten, resize, rename, relocate, delete."""

from typing import TYPE_CHECKING, Literal

import click

import onionskin
from onionskin.base.sizes import format_size
from onionskin.cli import losses, output
from onionskin.cli.arguments import (
    FILE,
    NEW_SIZE,
    NEW_SNAPSHOT,
    NEW_VOLUME,
    SIZE,
    SNAPSHOT,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    WIPE,
    Name,
    NewSize,
    block_size_option,
    live,
    matching,
    note_trust,
    open_store,
    refuse_volume,
    trust_option,
    wipe_option,
)
from onionskin.cli.chosen import find_snapshot, same_store
from onionskin.cli.losses import dry_run_option, yes_option
from onionskin.cli.output import json_option
from onionskin.cli.values import snapshot_value, volume_value
from onionskin.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.control.client import LiveVolume
    from onionskin.operations.losses import Loss
    from onionskin.store import Store
    from onionskin.volume import Volume


@click.command()
@click.argument("name", type=NEW_VOLUME, metavar="STORE/VOLUME")
@click.option("--base", type=FILE, help="A raw image below the volume, a file or a block device.")
@click.option(
    "--format",
    "base_format",
    type=click.Choice(["raw"]),
    help="Take the bytes of the base for the disk, whatever they look like.",
)
@click.option("--size", type=SIZE, help="Size of the disk, as 20G; by default that of the base.")
@block_size_option
@wipe_option
@click.option("--digest", is_flag=True, help="Take a digest of the whole base, for relocate --verify.")
@click.option("--group", help="Let the members of this group use the store that is made, too.")
@trust_option
@json_option
def create(
    name: Name,
    base: "Path | None",
    base_format: Literal["raw"] | None,
    size: int | None,
    block_size: int | None,
    wipe: Literal["release", "zero"] | None,
    digest: bool,
    group: str | None,
    as_json: bool,
) -> None:
    """Make a volume over a base image or over nothing.

    The store is made if it is missing. A directory that is there already has to be empty then.
    """
    from onionskin.exchange.image_formats import refuse_as_raw
    from onionskin.storage.chain import refuse_used_device

    if base is None and size is None:
        raise click.UsageError("a volume wants --base FILE or --size SIZE")
    if digest and base is None:
        raise click.UsageError("--digest is about the base: give --base FILE too")
    if base_format is not None and base is None:
        raise click.UsageError("--format is about the base: give --base FILE too")
    if base is not None:  # one that is missing, or is not to be had as a base, shall not leave an empty store behind
        refuse_volume(base)
        base.stat()
        if base.is_file() or base.is_block_device():  # to open a FIFO waits; it is refused below, as no regular file
            with open(base, "rb", buffering=0) as file:
                if base_format is None:
                    refuse_as_raw(file.fileno(), base)
                refuse_used_device(file.fileno(), base)
    with open_store(name.store, create=True, group=group) as store:
        store.create(
            name.volume,
            base=base,
            base_format=base_format,
            size=size,
            block_size=block_size,
            wipe=wipe,
            digest=digest,
        ).close()
        about = store.info(name.volume)
    over = f" over {about.base}" if about.base else ""
    output.tell(as_json, volume_value(about), lambda: f"made {name}: {output.size(about.size_bytes)}{over}")


@click.command()
@click.argument("name", type=SNAPSHOT, metavar="STORE/VOLUME@SNAPSHOT")
@click.argument("new_name", type=NEW_VOLUME, metavar="STORE/NEW")
@click.option("--wipe", type=WIPE, help="What happens to freed blocks; by default as where it comes from.")
@trust_option
@json_option
def clone(name: Name, new_name: Name, wipe: Literal["release", "zero"] | None, as_json: bool) -> None:
    """Make a new volume that starts as a snapshot.

    Nothing is copied. The clone begins with no snapshots of its own.
    """
    if new_name.store.resolve() != name.store.resolve():
        raise click.UsageError(
            f"a clone lives in the store of its snapshot: write {name.store}/{new_name.volume}, "
            "or copy with delta and apply"
        )
    with name.open_store() as store:
        store.clone(name.volume, name.required_snapshot, new_name.volume, wipe=wipe)
        about = store.info(new_name.volume)
    output.tell(as_json, volume_value(about), lambda: f"made {new_name}: a clone of {name}")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@trust_option
@json_option
def flatten(name: Name, as_json: bool) -> None:
    """Make a volume independent of its base and of other volumes.

    All data that it reads and does not own is copied.
    """
    with name.open_store() as store:
        with store.open(name.volume) as volume, output.progress(f"flatten {name}", as_json) as progress:
            volume.flatten(progress=progress)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"flattened {name}: it stands alone now")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("wanted", type=NEW_SIZE, metavar="[+]SIZE")
@click.option("--force", is_flag=True, help="Shrink, which drops what lies beyond the new end.")
@yes_option
@dry_run_option
@trust_option
@json_option
def resize(name: Name, wanted: NewSize, force: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Change the size of a disk.

    With a plus, as +10G, it grows by so much. Snapshots keep their sizes, and revert brings the old size back. A disk that is
    being served does not shrink.
    """
    with name.open_store() as store:
        with live(store, name.volume) or store.open(name.volume) as volume:
            size = volume.size_bytes + wanted.size_bytes if wanted.is_more else wanted.size_bytes
            shrinks = size < volume.size_bytes
            if dry_run or (shrinks and force):
                loss = _lost_by_shrinking(store, name, volume, size, force=force)
                if dry_run:
                    losses.tell_dry_run(as_json, "resize", [loss])
                    return
                losses.agree("resize", [loss], yes=yes)
            volume.resize(size, force=force)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} has {output.size(about.size_bytes)} now")


def _lost_by_shrinking(store: "Store", name: Name, volume: "Volume | LiveVolume", size: int, *, force: bool) -> "Loss":
    """Say what a resize drops, or refuse it as it would be refused itself."""
    from onionskin.operations.losses import Loss, of_shrinking
    from onionskin.operations.resize import refuse_cut, refuse_size

    refuse_size(size)
    if size >= volume.size_bytes:
        return Loss((), (), 0, False)
    if not isinstance(volume, onionskin.Volume):
        raise StateError(
            f"volume {name.volume!r} is being served and its clients may write up to its end; stop the server to shrink it"
        )
    refuse_cut(name.volume, volume.size_bytes, size, force=force)
    volume.flush()
    return of_shrinking(store._opened, name.volume, size)


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.argument("new_name", metavar="NEW")
@trust_option
@json_option
def rename(name: Name, new_name: str, as_json: bool) -> None:
    """Give a volume or a snapshot another name in its store.

    NEW is the name alone, or STORE/NEW; of a snapshot it is the name alone, or STORE/VOLUME@NEW. If the volume is being
    served, connected clients go on, and later clients ask for the new name. Clones and holds of a snapshot stay.
    """
    if name.snapshot is not None:
        _rename_snapshot(name, new_name, as_json=as_json)
        return
    new = NEW_VOLUME.convert(new_name, None, None) if "/" in new_name else Name(name.store, new_name)
    if new.store.resolve() != name.store.resolve():
        raise click.UsageError("a volume cannot move to another store; copy it with delta and apply")
    with name.open_store() as store:
        if served := live(store, name.volume):
            with served:
                served.rename(new.volume)
        else:
            store.rename(name.volume, new.volume)
        about = store.info(new.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} is {new} now")


def _rename_snapshot(name: Name, new_name: str, *, as_json: bool) -> None:
    new = Name(name.store, name.volume, new_name.removeprefix("@"))
    if "/" in new_name:
        new = NEW_SNAPSHOT.convert(new_name, None, None)
    if new.store.resolve() != name.store.resolve() or new.volume != name.volume:
        raise click.UsageError(
            f"a snapshot stays with its volume: write {name.store}/{name.volume}@NEW, or make a volume of it with clone"
        )
    with name.open_store() as store:  # of a served volume too: its server looks names up whenever one is asked for
        store.rename_snapshot(name.volume, name.required_snapshot, new.required_snapshot)
        value = snapshot_value(find_snapshot(store.snapshots(name.volume), new))
    output.tell(as_json, value, lambda: f"{name} is {new} now")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.option("--base", type=FILE, required=True, help="Where the base image is now.")
@click.option(
    "--trust",
    is_flag=True,
    callback=note_trust,
    help="Take your word that it holds the same bytes, and open a store that another user owns.",
)
@click.option("--verify", is_flag=True, help="Compare it with the digest that create --digest took.")
@json_option
def relocate(name: Name, base: "Path", trust: bool, verify: bool, as_json: bool) -> None:
    """Say where a base is that was moved or touched."""
    with name.open_store() as store:
        store.relocate(name.volume, base=base, trust=trust, verify=verify)
        about = store.info(name.volume)
    output.tell(as_json, volume_value(about), lambda: f"{name} is over {about.base} now")


@click.command()
@click.argument("names", type=VOLUME, nargs=-1, required=True, metavar="STORE/VOLUME|'STORE/PATTERN'...")
@click.option("--recursive", is_flag=True, help="Delete their snapshots too.")
@yes_option
@dry_run_option
@trust_option
@json_option
def delete(names: tuple[Name, ...], recursive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Delete volumes, with --recursive their snapshots too.

    The command refuses this while a clone needs one of them that is not deleted with it. All are of one store, and are
    deleted together, or none of them. A name with wildcards as a shell has them stands for all
    that match it, unless a volume has that very name.
    """
    from onionskin.operations import losses as of_store
    from onionskin.operations import volumes as of_names

    for name in names[1:]:
        same_store(names[0], name)
    with names[0].open_store() as store:
        if not dry_run:  # what would go is measured under locks, and their file cannot be opened there
            store._opened.catalog.refuse_read_only()
        called = matching(store, names)
        ids = of_names.ids_of(store._opened.catalog, called)
        loss = of_store.of_delete(store._opened, called, recursive=recursive)
        if dry_run:
            losses.tell_dry_run(as_json, "delete", [loss])
            return
        losses.agree("delete", [loss], yes=yes)
        on_disk = store._delete(called, recursive=recursive, agreed=ids)
    gone, freed = sorted(called), losses.freed([loss])  # as --dry-run says it: without what the files need themselves
    if freed is None:
        freed = on_disk
    back = f"; {format_size(freed)} come back" if freed else ""
    output.tell(as_json, {"deleted": gone, "bytes_freed": freed}, lambda: f"deleted {', '.join(gone)}{back}")
