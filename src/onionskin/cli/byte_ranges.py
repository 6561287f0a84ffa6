"""The verbs for ranges of bytes: read, write, trim, zero."""

import os
import stat
import sys
from typing import TYPE_CHECKING

import click

from onionskin.cli import output
from onionskin.cli.arguments import SIZE, VOLUME, VOLUME_OR_SNAPSHOT, Name, trust_option
from onionskin.cli.disk_output import stdout_for_a_disk
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from onionskin.control.client import LiveVolume
    from onionskin.volume import Volume

_CHUNK_BYTES = 1 << 20


def _check_range(volume: "Volume | LiveVolume", name: Name, offset: int, length: int) -> None:
    """Refuse a range that does not lie in the disk before any of it is touched."""
    if offset + length > volume.size_bytes:
        raise ValueError(
            f"bytes {offset} to {offset + length} do not lie in {name}, which has {volume.size_bytes}; "
            "choose a smaller range, or resize the volume"
        )


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@click.argument("offset", type=SIZE)
@click.argument("length", type=SIZE)
@trust_option
@json_option
def read(name: Name, offset: int, length: int, as_json: bool) -> None:
    """Write a range of a disk to stdout.

    With --json, as base64. Its bytes are not written to a terminal: pipe them, as to 'xxd'.
    """
    if not as_json and sys.stdout.isatty():
        raise click.UsageError(
            "bytes of a disk are not for a terminal: pipe them to a program such as xxd, or give --json"
        )
    with name.open_store() as store, name.volume_or_view_in(store) as volume:
        _check_range(volume, name, offset, length)
        if as_json:
            import base64

            data = base64.b64encode(volume.read(offset, length)).decode()
            output.show(True, {"offset": offset, "length": length, "base64": data}, str)
            return
        with stdout_for_a_disk(store, length) as out:
            for at in range(offset, offset + length, _CHUNK_BYTES):
                out.write(volume.read(at, min(_CHUNK_BYTES, offset + length - at)))
            out.finish()


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("offset", type=SIZE)
@trust_option
@json_option
def write(name: Name, offset: int, as_json: bool) -> None:
    """Write stdin to a disk at OFFSET.

    The data is durable when the command succeeds.

    If stdin is a file or a block device, data that would not fit is refused before any of it is written. From a pipe,
    the data that fits is written first.
    """
    if sys.stdin.isatty():
        raise click.UsageError("write takes its data from stdin: pipe something to it")
    source = output.StandardStream("stdin")
    written = 0
    with name.open_store() as store, store.open(name.volume) as volume:
        _check_range(volume, name, offset, _length_of_file(source))
        while data := source.read(_CHUNK_BYTES):
            _check_range(volume, name, offset + written, len(data))
            volume.write(offset + written, data)
            written += len(data)
        volume.flush()
    value = {"offset": offset, "length": written}
    output.tell(as_json, value, lambda: f"wrote {output.size(written)} to {name} at {offset}")


def _length_of_file(source: output.StandardStream) -> int:
    """Return the bytes left in a file or a block device; 0 for a pipe, whose length is not known."""
    try:
        status = os.fstat(source.fileno())
        if stat.S_ISBLK(status.st_mode):
            at = os.lseek(source.fileno(), 0, os.SEEK_CUR)
            end = os.lseek(source.fileno(), 0, os.SEEK_END)
            os.lseek(source.fileno(), at, os.SEEK_SET)
            return end - at
        return max(0, status.st_size - source.tell()) if stat.S_ISREG(status.st_mode) else 0
    except OSError:
        return 0


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("offset", type=SIZE)
@click.argument("length", type=SIZE)
@trust_option
@json_option
def trim(name: Name, offset: int, length: int, as_json: bool) -> None:
    """Free a range that is no longer needed.

    It reads zero from then on.
    """
    with name.open_volume() as (_, volume):
        _check_range(volume, name, offset, length)
        volume.trim(offset, length)
        volume.flush()
    value = {"offset": offset, "length": length}
    output.tell(as_json, value, lambda: f"trimmed {output.size(length)} of {name} at {offset}")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.argument("offset", type=SIZE)
@click.argument("length", type=SIZE)
@trust_option
@json_option
def zero(name: Name, offset: int, length: int, as_json: bool) -> None:
    """Make a range read zero."""
    with name.open_volume() as (_, volume):
        _check_range(volume, name, offset, length)
        volume.zero(offset, length)
        volume.flush()
    value = {"offset": offset, "length": length}
    output.tell(as_json, value, lambda: f"zeroed {output.size(length)} of {name} at {offset}")
