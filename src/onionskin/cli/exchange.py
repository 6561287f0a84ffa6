"""The verbs that move disks between files and stores: import, export, delta, apply."""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import click

from onionskin.cli import output
from onionskin.cli.arguments import (
    NEW_VOLUME,
    PLAIN_FILE,
    SNAPSHOT,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    Name,
    block_size_option,
    open_store,
    open_to_read,
    refuse_url,
    refuse_volume,
    trust_option,
    wipe_option,
)
from onionskin.cli.chosen import same_store
from onionskin.cli.disk_output import stdout_for_a_disk
from onionskin.cli.output import json_option
from onionskin.cli.values import snapshot_value, volume_value
from onionskin.exchange.image_formats import KNOWN, NOT_MADE, READ, SUFFIXES, refuse_options

if TYPE_CHECKING:
    from onionskin.base.paths import FilePath
    from onionskin.delta import Delta, Readable
    from onionskin.images import ImageKind
    from onionskin.store import Store

FORMAT = click.Choice(READ)
_CHUNK_BYTES = 1 << 20
_STDIN = {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}
_STDOUT = {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}
_NOT_TYPED = "an image is not for a terminal: pipe it to a program, or give a file"
_GOALS = {"stdout": "stdout", "stream": "a pipe", "character": "a character device", "device": "a block device"}


@click.command(name="import")
@click.argument("image", type=PLAIN_FILE)
@click.argument("name", type=NEW_VOLUME, metavar="STORE/VOLUME")
@click.option("--format", "image_format", type=FORMAT, help="Format of IMAGE; by default told by its first bytes.")
@block_size_option
@wipe_option
@trust_option
@json_option
def import_(
    image: "FilePath",
    name: Name,
    image_format: "ImageKind | None",
    block_size: int | None,
    wipe: Literal["release", "zero"] | None,
    as_json: bool,
) -> None:
    """Make a volume from a disk image.

    The image is raw, or qcow2, vmdk, vhd, vhdx or vdi through qemu-img. It is copied and not needed afterwards. An image
    whose format was told by its first bytes may not refer to other files; name its format to vouch for it.

    "-" reads stdin. An image that is compressed with gzip, xz, zstd, bzip2 or lz4 is unpacked by the system's program;
    --format raw takes its bytes as they are.
    """
    from onionskin.images import import_image

    notes: list[str] = []
    # An image that cannot be read shall not leave an empty store behind, and a pipe is opened once.
    with _image_to_read(image) as source, open_store(name.store, create=True) as store:
        with output.progress(f"import {image.name}", as_json) as progress:
            import_image(
                store,
                source,
                name.volume,
                format=image_format,
                block_size=block_size,
                wipe=wipe,
                progress=progress,
                note=notes.append,
            )
        about = store.info(name.volume)
    text = ", ".join([f"made {name}: {output.size(about.size_bytes)} from {image}", *notes])
    output.tell(as_json, volume_value(about), lambda: text)


@contextlib.contextmanager
def _image_to_read(image: "FilePath") -> "Iterator[FilePath | IO[bytes]]":
    """Give the path of a file that can be read, or else stdin or a pipe, open."""
    from onionskin.images import refuse_endless

    if str(image) in _STDIN:
        if sys.stdin.isatty():
            raise click.UsageError("an image is not typed: pipe one to import, or give a file")
        source = output.StandardStream("stdin")
        source.refuse_closed()
        refuse_endless(source.fileno(), "stdin")
        yield source  # type: ignore[misc]
        return
    refuse_volume(image)
    with open(image, "rb", buffering=0) as file:  # of a FIFO, this waits for a writer
        refuse_endless(file.fileno(), image)
        mode = os.fstat(file.fileno()).st_mode
        yield image if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else file


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.argument("image", type=PLAIN_FILE)
@click.option("--format", "image_format", type=FORMAT, help="Format of IMAGE; by default told by its suffix, or raw.")
@click.option("-c", "--compress", is_flag=True, help="Compress the data, of a qcow2 or VMDK image.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the format, as compression_type=zstd or subformat=fixed; several have commas between them.",
)
@click.option("--yes", is_flag=True, help="Write over what a block device holds without asking.")
@trust_option
@json_option
def export(
    name: Name,
    image: "FilePath",
    image_format: "ImageKind | None",
    compress: bool,
    options: tuple[str, ...],
    yes: bool,
    as_json: bool,
) -> None:
    """Write a volume or a snapshot as a disk image.

    IMAGE must not exist yet. Holes are kept. "-" writes a raw image to stdout, with holes as zeros, and the summary of
    --json to stderr.

    If IMAGE is a FIFO, the raw image is written to it. If it is a block device, the raw image is written over what the
    device holds, which wants --yes where no terminal is. What the device has behind the end of the disk stays.
    """
    options = tuple(option for several in options for option in several.split(","))  # as qemu-img takes them
    goal = _goal(image)
    if goal == "file":
        refuse_url(image, to_write=True)
    kind = image_format or ("raw" if goal != "file" else _format_by_suffix(image))
    refuse_options(kind, options, compress=compress)
    if goal != "file":
        if image_format not in (None, "raw"):
            raise click.UsageError(f"only a raw image can be written to {_GOALS[goal]}: give a file for {image_format}")
        write = _export_to_device if goal == "device" else _export_as_stream
        write(name, image, as_json=as_json, yes=yes)
        return
    from onionskin.images import export_image

    with name.open_store() as store, open_to_read(store, name) as volume:
        with output.progress(f"export {name}", as_json) as progress:
            export_image(volume, image, format=kind, progress=progress, compress=compress, options=options)
        size_bytes = volume.size_bytes
    allocated = image.stat().st_blocks * 512
    value = {"path": str(image), "format": kind, "size_bytes": size_bytes, "allocated_bytes": allocated}
    output.tell(as_json, value, lambda: f"wrote {image}: {output.size(size_bytes)}, {kind}")


def _format_by_suffix(image: "FilePath") -> "ImageKind":
    """Return the format that a file's name promises: a raw image under the name of another format would deceive."""
    suffix = image.suffix[1:].lower()
    kind = SUFFIXES.get(suffix, suffix)
    if kind not in READ and (kind in KNOWN or kind in NOT_MADE):
        raise click.UsageError(
            f"{image} has the name of a {kind} file, which is not written here: give --format, one of {', '.join(READ)}"
        )
    return cast("ImageKind", kind) if kind in READ else "raw"


def _goal(image: "FilePath") -> Literal["file", "stdout", "stream", "character", "device"]:
    """Tell what is at a path that is to be written."""
    if str(image) in _STDOUT:
        return "stdout"
    try:
        mode = image.stat().st_mode
    except OSError:  # whoever makes the file says what is wrong
        return "file"
    if stat.S_ISBLK(mode):
        return "device"
    if stat.S_ISCHR(mode):
        return "character"
    return "stream" if stat.S_ISFIFO(mode) else "file"


def _export_as_stream(name: Name, image: "FilePath", *, as_json: bool, yes: bool) -> None:
    """Write a raw image to stdout or to a FIFO. Nothing is lost by that, so `yes` does not matter."""
    from onionskin.images import reading

    is_stdout = str(image) in _STDOUT
    if is_stdout:
        if sys.stdout.isatty():
            raise click.UsageError(_NOT_TYPED)
        output.StandardStream("stdout").refuse_closed()
    with name.open_store() as store, open_to_read(store, name) as volume:
        size_bytes = volume.size_bytes
        with (
            _stream_to(store, image, size_bytes) as out,
            reading(volume) as disk,
            output.progress(f"export {name}", as_json) as progress,
        ):
            for at in range(0, size_bytes, _CHUNK_BYTES):
                piece = disk.read(at, min(_CHUNK_BYTES, size_bytes - at))
                out.write(piece)
                if progress is not None:
                    progress(at + len(piece), size_bytes)
            out.finish()
    value = {"path": str(image), "format": "raw", "size_bytes": size_bytes, "allocated_bytes": size_bytes}
    if not is_stdout:
        output.tell(as_json, value, lambda: f"wrote {image}: {output.size(size_bytes)}, raw")
    elif as_json:
        output.echo(output.as_json_text(value), err=True)


@contextlib.contextmanager
def _stream_to(store: "Store", image: "FilePath", size_bytes: int) -> Iterator[output.StandardStream]:
    if str(image) in _STDOUT:
        with stdout_for_a_disk(store, size_bytes) as out:
            yield out
        return
    with open(
        os.open(image, os.O_WRONLY | os.O_CLOEXEC), "wb", buffering=0
    ) as file:  # of a FIFO, this waits for a reader
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):  # it took the place of a pipe
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(image))
        if file.isatty():
            raise click.UsageError(_NOT_TYPED)
        yield output.StandardStream(str(image), file)


def _export_to_device(name: Name, image: "FilePath", *, as_json: bool, yes: bool) -> None:
    from onionskin.exchange.block_devices import BlockDevice
    from onionskin.images import export_to_device, refuse_device

    with name.open_store() as store, open_to_read(store, name) as volume, BlockDevice(image) as device:
        refuse_device(volume, device)
        size_bytes = volume.size_bytes
        if not yes:
            from onionskin.cli.question import confirm_loss

            confirm_loss(
                f"{image} has {output.size(device.size_bytes)}. Write over its first {output.size(size_bytes)}?",
                f"export would write over what {image} holds",
                advice="do so",
            )
        with output.progress(f"export {name}", as_json) as progress:
            export_to_device(volume, device, progress=progress)
    value = {"path": str(image), "format": "raw", "size_bytes": size_bytes, "allocated_bytes": size_bytes}
    output.tell(as_json, value, lambda: f"wrote {name} to {image}: {output.size(size_bytes)}")


@click.command()
@click.argument("names", type=SNAPSHOT, nargs=-1, required=True, metavar="[STORE/VOLUME@A] STORE/VOLUME@B")
@click.option("-o", "--output", "path", type=PLAIN_FILE, help="Write to this new file, and not to stdout (-).")
@click.option("--dry-run", is_flag=True, help="Write nothing, and say how much the stream would hold at most.")
@trust_option
@json_option
def delta(names: tuple[Name, ...], path: "FilePath | None", dry_run: bool, as_json: bool) -> None:
    """Write the changes between two snapshots as a stream.

    If no A is given, write all of B. Both may be of different volumes of a store, such as a snapshot and one of a clone.

    onionskin delta vms/web@a vms/web@b | ssh host onionskin apply vms/web

    With --json the summary goes to stdout if the stream goes to a file, else to stderr.
    """
    from onionskin import delta as stream

    if len(names) > 2:
        raise click.UsageError("delta takes one snapshot or two")
    b = names[-1]
    start = None
    if len(names) == 2:
        same_store(names[0], b)
        start = f"{names[0].volume}@{names[0].required_snapshot}"
    if dry_run:
        _tell_estimate(names, start, as_json=as_json)
        return
    if str(path) in _STDOUT:
        path = None
    elif path is not None and _goal(path) != "file":
        raise click.UsageError(
            f"{path} is {_GOALS[_goal(path)]}, and not a new file: leave out --output, and write '> {path}'"
        )
    if path is None and sys.stdout.isatty():
        raise click.UsageError("the stream is not for a terminal: pipe it to apply, or give --output FILE")
    with (
        b.open_store() as store,
        _new_file(store, path) as out,
        output.progress(f"delta {b}", as_json) as progress,
    ):
        sent = stream.delta(store, b.volume, start, b.required_snapshot, out, progress=progress)
        out.finish()
    value = _delta_value(names, sent)
    if path is not None:
        output.tell(as_json, value, lambda: f"wrote {path}: {output.size(sent.data_bytes)} of data")
    elif as_json:
        output.echo(output.as_json_text(value), err=True)


def _tell_estimate(names: tuple[Name, ...], start: str | None, *, as_json: bool) -> None:
    from onionskin import delta as stream

    b = names[-1]
    with b.open_store() as store:
        found = stream.estimate(store, b.volume, start, b.required_snapshot)
    text = f"the stream would have {output.size(found.data_bytes)} of data at most; nothing was written"
    output.show(as_json, {"dry_run": True} | _delta_value(names, found), lambda: text)


def _delta_value(names: tuple[Name, ...], about: "Delta") -> dict[str, Any]:
    a, b = names[0] if len(names) == 2 else None, names[-1]
    value = {
        "from": a.snapshot if a else None,
        "to": b.snapshot,
        "full": about.full,
        "size_bytes": about.size_b,
        "data_bytes": about.data_bytes,
        "zero_bytes": about.zero_bytes,
    }
    if a and a.volume != b.volume:
        value |= {"from_volume": a.volume, "to_volume": b.volume}
    return value


@contextlib.contextmanager
def _new_file(store: "Store", path: "FilePath | None") -> Iterator[output.StandardStream]:
    """Give stdout, or a new file, which has its name when it is durable and whole."""
    if path is None:
        with stdout_for_a_disk(store) as out:
            yield out
        return
    from onionskin.operations.new_file import new_file

    with output.naming(str(path)), new_file(path) as file:
        yield output.StandardStream(str(path), file)


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("file", type=PLAIN_FILE, default="-")
@trust_option
@json_option
def apply(name: Name, file: "FilePath", as_json: bool) -> None:
    """Bring a volume to the snapshot that a stream leads to.

    The stream comes from stdin or FILE.

    The volume must be exactly where the stream starts. A stream that holds a whole disk needs a new volume,
    made with create --size, of any size. A stream that is cut short or damaged changes nothing.
    """
    from onionskin import delta as stream

    with contextlib.ExitStack() as stack:
        if str(file) != "-":
            source: Readable = stack.enter_context(open(file, "rb"))
        elif sys.stdin.isatty():
            raise click.UsageError("apply reads a stream: pipe delta to it, or give FILE")
        else:
            source = output.StandardStream("stdin")
        store = stack.enter_context(name.open_store())
        volume = stack.enter_context(store.open(name.volume))
        progress = stack.enter_context(output.progress(f"apply to {name}", as_json))
        taken = stream.apply(source, volume, progress=progress)
    output.tell(as_json, snapshot_value(taken), lambda: f"{name} is at {taken.name} now")
