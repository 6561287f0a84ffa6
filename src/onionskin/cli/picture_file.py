"""Files that verbs write pictures to."""

from typing import Any

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output


class PictureType(click.ParamType):  # type: ignore[type-arg]
    """A file to write: its suffix gives the format, and keeps a slip from overwriting a disk image."""

    name = "FILE"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> FilePath:
        """Make a path of it, or fail as a usage error; `-` is stdout, and gets SVG."""
        path = FilePath(value)
        if str(path) != "-" and path.suffix.lower() not in self.suffixes:
            self.fail(f"{str(path)!r} is no picture: name it {' or '.join('*' + one for one in self.suffixes)}", param)
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Let the shell offer files."""
        return [click.shell_completion.CompletionItem(incomplete, type="file")]


def write_picture(path: FilePath, picture: bytes) -> None:
    """Write a picture to a file, which is replaced, or to stdout."""
    if str(path) == "-":
        out = output.StandardStream("stdout")
        out.write(picture)
        out.flush()
    else:
        try:
            with open(path, "wb") as file:
                file.write(picture)
        except OSError as error:
            error.filename = str(path)  # that of a write is not told
            raise
