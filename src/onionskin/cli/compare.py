"""The verb compare: where two disks first differ, each a volume, a snapshot or an image file."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.paths import FilePath
from onionskin.cli import exit_status, output
from onionskin.cli.arguments import VOLUME_OR_SNAPSHOT, Name, open_to_read, refuse_url, trust_option
from onionskin.cli.output import json_option
from onionskin.errors import FormatError, OnionskinError
from onionskin.exchange.image_formats import READ, format_of

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from onionskin.exchange.comparison import RawFile
    from onionskin.exchange.qemu_img import Image
    from onionskin.volume import Volume

DIFFERENT = 1  # an error has another status


class SideType(click.ParamType):  # type: ignore[type-arg]
    """A volume or a snapshot, or a file that is there."""

    name = "STORE/VOLUME[@SNAPSHOT]|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Name | FilePath:
        """Take a file that is there for one, and everything else for a name."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        path = FilePath(value)
        try:
            if path.is_file() or path.is_block_device():
                return path
            if path.exists() and not path.is_dir():
                self.fail(
                    f"{value} is neither a file nor a block device, and is not compared: write what it holds to a file, or "
                    "give it to 'onionskin import -', first",
                    param,
                    ctx,
                )
        except OSError as error:  # its status would be that of a difference
            self.fail(f"{value}: {error.strerror}; check the path", param, ctx)
        refuse_url(path)
        if "/" not in value:
            self.fail(f"{value} does not exist as a file, and a volume is named STORE/VOLUME", param, ctx)
        return VOLUME_OR_SNAPSHOT.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Offer names in a store, else files."""
        from click.shell_completion import CompletionItem

        found = VOLUME_OR_SNAPSHOT.shell_complete(ctx, param, incomplete)
        return [one for one in found if one.type == "plain"] or [CompletionItem(incomplete, type="file")]


class OpenVolume:
    """A volume, or a view, as a disk to compare."""

    def __init__(self, volume: "Volume") -> None:
        self.volume = volume
        self.size_bytes = volume.size_bytes

    def readinto(self, offset: int, buffer: Any) -> int:
        """Fill a buffer."""
        return self.volume.readinto(offset, buffer)

    def ranges(self) -> Iterable[tuple[int, int]]:
        """Give what the layers hold, and where the base has data."""
        from onionskin.base.files import data_ranges
        from onionskin.kernels._extents import Extents
        from onionskin.operations.copy import extents

        found, base_lock = extents(self.volume._opened), self.volume._opened.base_lock
        if base_lock is not None:
            found = found.over(Extents(data_ranges(base_lock.descriptor, 0, self.size_bytes)))
        return [(offset, offset + length) for offset, length, *_ in found]


@click.command()
@click.argument("a", type=SideType(), metavar="A")
@click.argument("b", type=SideType(), metavar="B")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(READ),
    help="Format of image files; by default told by their first bytes.",
)
@click.option("--strict", is_flag=True, help="Disks of different sizes differ, also where the rest is zero.")
@trust_option
@json_option
def compare(a: Name | FilePath, b: Name | FilePath, image_format: str | None, strict: bool, as_json: bool) -> None:
    """Tell whether two disks read the same.

    A and B are volumes, snapshots or image files. Exit status 0 means that they read the same, and 1 that they differ;
    an error has status 2 or more. If the sizes differ, the shorter disk counts as zero behind its end.
    """
    with _errors_are_no_difference():
        at, sizes = _compared([a, b], image_format, strict=strict, as_json=as_json)
        value = {"same": at is None, "first_difference": at, "size_bytes": sizes}
        note = "" if sizes[0] == sizes[1] else f"; {a} has {sizes[0]} bytes, and {b} {sizes[1]}"
        said = "the same" if at is None else f"different from byte {at} on"
        output.show(as_json, value, lambda: f"{said}{note}")
    if at is not None:
        raise click.exceptions.Exit(DIFFERENT)


def _compared(
    disks: list[Name | FilePath], image_format: str | None, *, strict: bool, as_json: bool
) -> tuple[int | None, list[int]]:
    """Return where two disks first differ, or None, and their sizes; once it is known that neither changed meanwhile."""
    from onionskin.exchange.comparison import RawFile, first_difference

    with ExitStack() as stack:
        sides = [stack.enter_context(_opened(disk, image_format)) for disk in disks]
        sizes = [side.size_bytes for side in sides]
        if strict and sizes[0] != sizes[1]:
            return min(sizes), sizes
        with output.progress(f"compare {disks[0]} with {disks[1]}", as_json) as progress:
            one, other = sides
            if isinstance(one, RawFile | OpenVolume) and isinstance(other, RawFile | OpenVolume):
                return first_difference(one, other, progress), sizes
            return _by_qemu_img(sides, progress), sizes


@contextlib.contextmanager
def _errors_are_no_difference() -> Iterator[None]:
    try:
        yield
    except (OnionskinError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) or exit_status.status_of(error) != DIFFERENT:
            raise
        exit_status.say(exit_status.line_of(error))
        raise click.exceptions.Exit(exit_status.USAGE) from error


@contextlib.contextmanager
def _opened(side: Name | FilePath, image_format: str | None) -> "Iterator[RawFile | OpenVolume | Image]":
    from onionskin.exchange.comparison import RawFile
    from onionskin.images import reading, refuse_changed
    from onionskin.storage.base_looks import looks_of

    if isinstance(side, Name):
        with side.open_store() as store, open_to_read(store, side) as volume, reading(volume):
            yield OpenVolume(volume)
        return
    with open(side, "rb", buffering=0) as file:
        found = format_of(file.fileno())
        if image_format is None and found and found.name not in READ:
            raise FormatError(
                f"{side} is {found.title}, which is not read here: {found.advice} first, or give --format raw"
            )
        kind = image_format or (found.name if found else "raw")
        before = looks_of(file.fileno())
        descriptor = file.fileno()
        yield RawFile(descriptor) if kind == "raw" else _image(side, kind, descriptor, vouched=image_format is not None)
        refuse_changed(file.fileno(), before, str(side))


def _image(path: FilePath, kind: str, descriptor: int, *, vouched: bool) -> "Image":
    from onionskin.exchange.qemu_img import Image

    image = Image(path, kind, str(path), descriptor)
    if not vouched:
        image.refuse_other_files()
    image.refuse_cut_short()
    return image


def _by_qemu_img(sides: "list[RawFile | OpenVolume | Image]", progress: Any) -> int | None:
    """Let qemu-img compare; it reads our volumes over NBD. It tells the sector that differs."""
    from onionskin.exchange import qemu_img
    from onionskin.exchange.comparison import RawFile
    from onionskin.nbd.for_program import served_to_program

    with ExitStack() as stack:
        keep, described = [], []
        for side in sides:
            if isinstance(side, OpenVolume):
                disk = stack.enter_context(served_to_program(side.volume._path, qemu_img.EXPORT, writable=False))
                keep.append(disk)
                described.append(qemu_img.served_disk(disk))
            elif isinstance(side, RawFile):
                keep.append(side.descriptor)
                described.append(qemu_img.file_of("raw", f"/proc/self/fd/{side.descriptor}"))
            else:
                keep += side.keep
                described.append(side.description)
        total = max(side.size_bytes for side in sides)
        percent = (lambda done: progress(int(total * done / 100), total)) if progress else None
        return qemu_img.first_difference(*described, keep=keep, percent=percent)
