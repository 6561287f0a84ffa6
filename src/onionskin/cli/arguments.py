"""Names (STORE, STORE/VOLUME and STORE/VOLUME@SNAPSHOT) and sizes: how they are parsed, opened and completed.

The last component of the path is the volume, and the rest of the path is the store. A completion never makes, locks or
repairs anything. It reads the catalog of a directory that is a store, and prints nothing if it cannot.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

import onionskin  # its classes are loaded by name at their use: they bring NumPy, and no --help should wait for that
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.paths import FilePath
from onionskin.base.sizes import parse_size
from onionskin.errors import OnionskinError, VolumeNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from click.shell_completion import CompletionItem

    from onionskin.control.client import LiveVolume
    from onionskin.store import Store
    from onionskin.volume import Volume


class Name(NamedTuple):
    """A volume of a store, or one of its snapshots."""

    store: FilePath
    volume: str
    snapshot: str | None = None

    def __str__(self) -> str:
        """Write the name as it is given on the command line."""
        text = f"{str(self.store).rstrip('/')}/{self.volume}"
        return text if self.snapshot is None else f"{text}@{self.snapshot}"

    @property
    def required_snapshot(self) -> str:
        """The snapshot of a name whose kind promises one."""
        if self.snapshot is None:
            raise AssertionError(f"{self} was parsed as the name of a snapshot")
        return self.snapshot

    def open_store(self) -> "Store":
        """Open the store, which must exist."""
        return open_store(self.store)

    @contextmanager
    def open_volume(self) -> "Iterator[tuple[Store, Volume | LiveVolume]]":
        """Open the volume for writing or, where a server holds it, connect to that.

        Only here does a verb get a volume that is being served.
        """
        with self.open_store() as store, live(store, self.volume) or store.open(self.volume) as volume:
            yield store, volume

    @contextmanager
    def volume_or_view_in(self, store: "Store") -> "Iterator[Volume | LiveVolume]":
        """Open the named volume of its open store, or the snapshot as a view, to read it."""
        served = live(store, self.volume) if self.snapshot is None else None
        with served or open_to_read(store, self) as volume:
            yield volume


_TRUST = "onionskin.trust"


_READ_BY = {
    **dict.fromkeys(("nbd", "nbds", "nbd+unix", "nbds+unix"), "nbdcopy 'URL' -"),
    **dict.fromkeys(("http", "https", "ftp", "ftps"), "curl -fL 'URL'"),
    **dict.fromkeys(("ssh", "sftp", "scp"), "ssh HOST cat PATH"),
}


def refuse_url(path: "str | Path | FilePath", *, to_write: bool = False) -> None:
    """Raise FileNotFoundError if nothing is at a path, and the path looks like a URL, or like what qemu-img takes for one."""
    import errno
    import re

    found = re.match(r"([a-z][a-z0-9+.-]+):(?=/)|(json|nbd|rbd|ssh):", str(path))
    if not found or os.path.lexists(path):
        return
    if to_write:
        advice = "write a file, or pipe 'onionskin export NAME -' to a program, as nbdcopy, that writes there"
    else:
        by = _READ_BY.get(found[1] or found[2], "what reads it")
        advice = f"give a file, or pipe it: {by} | onionskin import - STORE/VOLUME"
    raise FileNotFoundError(errno.ENOENT, f"no such file, and a URL is not followed; {advice}", str(path))


def refuse_volume(path: "Path | FilePath") -> None:
    """Raise FileNotFoundError if no image is at a path, and the path looks like a volume of a store, or like a URL."""
    import errno

    refuse_url(path)
    if is_store(FilePath(path.parent)) and not os.path.lexists(path):
        raise FileNotFoundError(
            errno.ENOENT,
            "no such file, but a name in a store, and an image is wanted; 'onionskin clone' makes a volume of a snapshot",
            str(path),
        )


def trust_option(command: Any) -> Any:
    """Give a verb the option --trust; `open_store` asks for its value."""
    return click.option(
        "--trust", is_flag=True, expose_value=False, callback=note_trust, help="Open a store that another user owns."
    )(command)


def note_trust(ctx: click.Context, _: click.Parameter, trust: bool) -> bool:
    """Keep the value of --trust for `open_store`: the callback of that option."""
    ctx.meta[_TRUST] = trust
    return trust


def is_trusted() -> bool:
    """Whether --trust was given to the verb that runs."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(_TRUST))


def _hint(value: str, ctx: click.Context | None) -> str:
    """Say what may be meant by a word that names no volume, by the verb that it is given to."""
    from onionskin.cli import verbs

    is_word = "/" not in value and ctx is not None and not os.path.lexists(value)
    return verbs.hint(ctx.command.name, value) if is_word and ctx is not None else ""


def refuse_file(path: "str | FilePath") -> None:
    """Raise VolumeNotFoundError if what is named as a store is a file: it may be an image, as other programs take it."""
    if os.path.isfile(path):  # noqa: PTH113 - FilePath.is_file raises where it cannot search
        raise VolumeNotFoundError(
            f"{path} is a file, and no store; 'onionskin import IMAGE STORE/VOLUME' makes a volume of an image, 'onionskin "
            "create --base' stands one on it, and 'qemu-img info' describes it"
        )


def open_store(path: FilePath, *, create: bool = False, group: str | None = None) -> "Store":
    """Open a store as the options of the verb say; it must exist, unless `create`.

    Raises
    ------
    VolumeNotFoundError
        It is none. What looks like a volume of a store that is there is named as one.
    FileExistsError
        It is to be made, in a directory that has something else in it.
    """
    if create and not is_store(path):
        _refuse_occupied(path)
    if not create and not is_store(path):
        if is_store(path.parent) and not os.path.lexists(path):
            raise VolumeNotFoundError(f"{path} is no store, but a name in the store {path.parent}: give {path.parent}")
        refuse_file(path)
    return onionskin.Store(path, create=create, trust=is_trusted(), group=group)


def _refuse_occupied(path: FilePath) -> None:
    """Raise FileExistsError if a directory has files that no store has: one is made where nobody keeps anything else.

    What a creation left that was killed, or has made so far in another process, is no such file, nor is the directory that
    a new ext4 has.
    """
    from onionskin.storage.layout import Layout

    try:
        found = os.listdir(path)
    except OSError:
        return  # it is missing or no directory: what makes the store says so
    layout = Layout(path)
    foreign = sorted(name for name in found if name != "lost+found" and not layout.is_of_store(name))
    if foreign and not is_store(path):  # another process may have made it meanwhile, and put something beside it
        import errno

        from onionskin.base.naming import some_of

        raise FileExistsError(
            errno.EEXIST,
            f"it is no store, and has something else in it ({some_of(foreign)}); name a directory that is empty or not there",
            str(path),
        )


def open_to_read(store: "Store", name: Name) -> "Volume":
    """Open a snapshot, or a head that nobody else holds, so that nothing is written: neither to it nor to the store."""
    if name.snapshot is not None:
        return store.open(name.volume, snapshot=name.snapshot)
    return store.open(name.volume, mode="r")


def live(store: "Store", name: str) -> "LiveVolume | None":
    """Connect to the server of a volume; None if no server holds it."""
    from onionskin.storage.locks import volume_holder

    if volume_holder(store._opened.layout.volume_lock(store._opened.catalog.volume(name).id)) is None:
        return None  # the usual case; then the client's code is not even imported
    from onionskin.control import client

    return client.find(store, name)


def parse_name(text: str) -> Name:
    """Take STORE/VOLUME[@SNAPSHOT] apart.

    Raises
    ------
    ValueError
        A part is missing or empty; the message says which.
    """
    directory, slash, last = text.rpartition("/")
    if not slash:
        raise ValueError(f"{text!r} names no store: write STORE/VOLUME, as ./{text} for a store that is here")
    volume, at, snapshot = last.partition("@")
    if not volume:
        raise ValueError(f"{text!r} names no volume: write STORE/VOLUME or STORE/VOLUME@SNAPSHOT")
    if at and not snapshot:
        raise ValueError(f"{text!r} names no snapshot behind the @")
    return Name(FilePath(directory or "/"), volume, snapshot or None)


WIPE = click.Choice(["release", "zero"])


class NameType(click.ParamType):  # type: ignore[type-arg]
    """A name; ``snapshot`` says whether one is wanted ("required"), allowed ("optional") or not ("none").

    ``fresh``: the last part is about to be made, so only the parts before it are completed. ``ranges``: the end of a range
    as @A..@C is completed too.
    """

    def __init__(self, snapshot: str, *, fresh: bool = False, ranges: bool = False) -> None:
        self.snapshot = snapshot
        self.fresh = fresh
        self.ranges = ranges
        self.wanted = "VOLUME"
        self.name = {
            "required": "STORE/VOLUME@SNAPSHOT",
            "optional": "STORE/VOLUME[@SNAPSHOT]",
            "none": "STORE/VOLUME",
        }[snapshot]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Name:
        """Parse the text, or fail as a usage error."""
        if isinstance(value, Name):
            return value
        if is_store(FilePath(value)) and not is_store(FilePath(value).parent):
            self.fail(f"{value!r} is a store: write {value.rstrip('/')}/{self.wanted}", param, ctx)
        try:
            name = parse_name(value)
        except ValueError as wrong:
            self.fail(f"{wrong}{_hint(value, ctx)}", param, ctx)
        if self.snapshot == "required" and name.snapshot is None:
            self.fail(f"{value!r} names no snapshot: write {value}@SNAPSHOT", param, ctx)
        if self.snapshot == "none" and name.snapshot is not None:
            self.fail(f"{value!r} names a snapshot where a {self.wanted.lower()} is wanted", param, ctx)
        return name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Offer directories until a store is reached, then the names in it."""
        from click.shell_completion import CompletionItem

        directory, slash, last = incomplete.rpartition("/")
        store = FilePath(os.path.expanduser(directory) or "/")  # noqa: PTH111 - the shell passes a ~ as it was typed
        if not slash or not is_store(store):
            return [CompletionItem(incomplete, type="dir")]
        if self.fresh and (self.snapshot == "none" or "@" in last):
            return []
        # If a snapshot is required, whole names are offered: a shell puts a blank behind a single match.
        with_snapshots = "@" in last or (self.snapshot == "required" and not self.fresh)
        there = self.names_in(store, with_snapshots)
        names = [name for name in there if name.startswith(last)]
        begun, dots, end = last.rpartition("..")
        if dots and not names and self.ranges:  # the end of a range, of the same volume as its beginning
            ends = "@" + end.removeprefix("@")
            of_volume = begun.partition("@")[0]
            names = [f"{begun}..@{name.partition('@')[2]}" for name in there if name.startswith(of_volume + ends)]
        return [CompletionItem(f"{directory}/{name}") for name in names]

    def names_in(self, store: FilePath, with_snapshots: bool) -> list[str]:
        """Return the volumes of a store, or the snapshots of all of them; nothing where it cannot be read."""
        return _names_in(store, with_snapshots)


class VolumeOrStoreType(NameType):
    """A volume, one of its snapshots, or a store: the directory itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text, or fail as a usage error. What is a store is meant as one.

        Raises
        ------
        VolumeNotFoundError
            Neither it nor the directory that it is in is a store.
        """
        if not isinstance(value, str):
            return super().convert(value, param, ctx)
        if value == "":
            self.fail("the name is empty", param, ctx)
        if is_store(FilePath(value)):
            return FilePath(value)
        directory, slash, last = value.rstrip("/").rpartition("/")
        above = FilePath(directory or ("/" if slash else "."))
        if not is_store(above) and os.access(above, os.X_OK):  # of one that cannot be searched nobody knows
            refuse_file(value)
            if hint := _hint(value, ctx):
                self.fail(f"{value!r} does not exist as a store{hint}", param, ctx)
            neither = f"neither {value!r} nor {above!s} is" if slash else f"{value!r} does not exist as"
            named = "STORE" if slash else value
            raise VolumeNotFoundError(
                f"{neither} a store; 'onionskin create {named}/VOLUME --size SIZE' makes one with its first volume"
            )
        if not slash:
            self.fail(
                f"{value!r} does not exist as a store; for the volume of the store that is here, write ./{last}",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class StoreType(click.ParamType):  # type: ignore[type-arg]
    """The directory of a store."""

    name = "STORE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> FilePath:
        """Make a path of it, or fail as a usage error."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return FilePath(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Let the shell offer directories."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


class FileType(click.ParamType):  # type: ignore[type-arg]
    """A path of any file, as `pathlib.Path`.

    `click.Path` looks for translations, and `pathlib` takes longer to import than a short verb to run: few verbs need either.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Path":
        """Make a path of it, or fail as a usage error: an empty text comes from a variable that is not set."""
        from pathlib import Path

        if value == "":
            self.fail("the path is empty", param, ctx)
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Let the shell offer files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class PlainFileType(FileType):
    """A path of any file, as `FilePath`, for verbs that do without `pathlib`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> FilePath:  # type: ignore[override]
        """Make a path of it, or fail as a usage error: an empty text comes from a variable that is not set."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return FilePath(value)


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, as 4096, 512K, 20G or 1TiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text, or fail as a usage error."""
        try:
            return parse_size(value)
        except ValueError as wrong:
            self.fail(str(wrong), param, ctx)


class NewSize(NamedTuple):
    """A size that a disk is to have, or to have more than now."""

    size_bytes: int
    is_more: bool


class NewSizeType(click.ParamType):  # type: ignore[type-arg]
    """A size, or with a plus before it, a growth: 20G, +20G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NewSize:
        """Parse the text, or fail as a usage error."""
        if isinstance(value, NewSize):
            return value
        return NewSize(SIZE.convert(value.removeprefix("+"), param, ctx), value.startswith("+"))


class LabelType(click.ParamType):  # type: ignore[type-arg]
    """A label, as KEY=VALUE."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Take the two apart at the first =, or fail as a usage error."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is no label; write KEY=VALUE", param, ctx)
        return key, text


LABEL = LabelType()


def label_option(about: str) -> "Callable[[Any], Any]":
    """Make the option --label, which may come several times."""
    return click.option("--label", "labels", type=LABEL, multiple=True, help=about)


class MachineNameType(NameType):
    """A machine of a store, or one of its snapshots: STORE/MACHINE[@SNAPSHOT]."""

    def __init__(self, snapshot: str, *, fresh: bool = False, ranges: bool = False) -> None:
        super().__init__(snapshot, fresh=fresh, ranges=ranges)
        self.wanted = "MACHINE"
        self.name = self.name.replace("VOLUME", self.wanted)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Name:
        """Parse the text, or fail as a usage error."""
        if isinstance(value, str) and "/" not in value and not is_store(FilePath(value)):
            self.fail(
                f"{value!r} names no store: write STORE/MACHINE, as ./{value} for a store that is here", param, ctx
            )
        return super().convert(value, param, ctx)

    def names_in(self, store: FilePath, with_snapshots: bool) -> list[str]:
        """Return the machines of a store, or the snapshots of all of them."""
        try:
            with onionskin.Store(store, create=False) as opened:
                names = [one.name for one in opened.machines()]
                if not with_snapshots:
                    return names
                return sorted(f"{name}@{one.name}" for name in names for one in opened.machine_snapshots(name))
        except (OnionskinError, OSError, ValueError):
            return []


STORE = StoreType()
MACHINE = MachineNameType("none")
NEW_MACHINE = MachineNameType("none", fresh=True)
MACHINE_SNAPSHOT = MachineNameType("required")
MACHINE_SNAPSHOT_OR_RANGE = MachineNameType("required", ranges=True)
MACHINE_OR_SNAPSHOT = MachineNameType("optional")
NEW_MACHINE_SNAPSHOT_OR_NONE = MachineNameType("optional", fresh=True)
VOLUME = NameType("none")
NEW_VOLUME = NameType("none", fresh=True)
SNAPSHOT = NameType("required")
SNAPSHOT_OR_RANGE = NameType("required", ranges=True)
VOLUME_OR_RANGE = NameType("optional", ranges=True)
NEW_SNAPSHOT = NameType("required", fresh=True)
VOLUME_OR_SNAPSHOT = NameType("optional")
VOLUME_SNAPSHOT_OR_STORE = VolumeOrStoreType("optional")
VOLUME_OR_STORE = VolumeOrStoreType("none")
NEW_SNAPSHOT_OR_NONE = NameType("optional", fresh=True)
SIZE = SizeType()
NEW_SIZE = NewSizeType()
FILE = FileType()
PLAIN_FILE = PlainFileType()
block_size_option = click.option(
    "--block-size",
    type=SIZE,
    help="Unit of copy-on-write, as 64K; by default that of the store, which 'get STORE' shows.",
)
wipe_option = click.option(
    "--wipe",
    type=WIPE,
    help="What happens to freed blocks: given back, or overwritten with zeros first; by default as 'get STORE' shows.",
)


def is_store(path: FilePath) -> bool:
    """Whether a directory is a store."""
    return os.path.isfile(path / "catalog.db")  # noqa: PTH113 - FilePath.is_file raises where it cannot search


def _names_in(path: FilePath, with_snapshots: bool) -> list[str]:
    try:
        with onionskin.Store(path, create=False) as store, store._opened.catalog.reading():
            catalog = store._opened.catalog
            hidden = catalog.owned_volumes()
            volumes = {row.id: row.name for row in catalog.volumes_by_name() if row.id not in hidden}
            if not with_snapshots:
                return list(volumes.values())
            named = [row for row in catalog.snapshots() if row.volume in volumes]
            return sorted(f"{volumes[row.volume]}@{row.name}" for row in named)
    except (OnionskinError, OSError, ValueError):
        return []


def matching(store: "Store", names: Sequence[Name]) -> list[str]:
    """Return the volumes that names of one store mean, each once.

    A name that no volume has is a pattern, as a shell's, if it has one of its characters.
    """
    from fnmatch import fnmatchcase

    there = list(store)
    called: list[str] = []
    for name in names:
        if name.volume in there or not any(character in name.volume for character in "*?["):
            called.append(name.volume)
            continue
        found = [one for one in there if fnmatchcase(one, name.volume)]
        if not found:
            raise VolumeNotFoundError(f"the store {store.path} has no volume that matches {name.volume!r}")
        called += found
    return list(dict.fromkeys(called))
