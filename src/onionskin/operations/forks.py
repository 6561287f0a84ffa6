"""Forks: many volumes that begin as one snapshot, or as the disk is now, made in one transaction.

What must hold: all forks of a call are there, or none. What is asked of the tree (whether names are free, which number comes
next, whether the key was used before) is asked inside the transaction that inserts them. A fork of a disk as it is now has
all that was written before the call.

Such a fork stands on a layer without a name. Where the head is empty it is put on the layer below, which others may change
meanwhile, as long as nothing that is read there goes: what a layer without a name holds, and all that stands on it hides,
is given up (hidden_blocks.py). So the layers are compared again inside the transaction.
"""

import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

from onionskin.base.durations import end_of, parse_duration
from onionskin.base.limits import NAME_BYTES_MAX, WIPE_POLICIES
from onionskin.base.naming import check_name, is_text, refuse_no_mapping, some_of
from onionskin.base.records import record
from onionskin.catalog import ForkCallRow, LabelRow, LayerRow, SnapshotRow, VolumeRow, new_ids
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import find_snapshot, unnamed_around
from onionskin.catalog.volumes import NUMBER_MAX
from onionskin.errors import FormatError, OnionskinError, StateError, VolumeExistsError
from onionskin.operations import lineage
from onionskin.operations.flush import flush
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.hidden_blocks import free_hidden
from onionskin.operations.seal import seal
from onionskin.storage.chain import NewHead, insert_copies
from onionskin.storage.open_head import OpenHead, is_unwritten
from onionskin.storage.open_store import OpenStore

FORKS_MAX = 10_000  # of one call: nobody else can change the store meanwhile
LABELS_MAX = 64
KEY_NANOSECONDS = 24 * 3600 * 1_000_000_000
DEFAULT_PATTERN = "{source}-{n}"


@record
class Pattern:
    """What the names of forks look like: a number of at least `width` digits, with zeros before it, between two texts."""

    prefix: str
    suffix: str
    width: int

    @property
    def text(self) -> str:
        """The pattern as `parse_pattern` reads it."""
        prefix, suffix = (part.replace("{", "{{").replace("}", "}}") for part in (self.prefix, self.suffix))
        return f"{prefix}{{n{f':0{self.width}' if self.width > 1 else ''}}}{suffix}"

    def name(self, number: int) -> str:
        """Return the name with this number."""
        return check_name("volume", f"{self.prefix}{number:0{self.width}}{self.suffix}")

    def names(self, numbers: range) -> list[str]:
        """Return the names with these numbers, which go up.

        Names that differ in their digits alone are all names if the first is one, and the last, which is the longest.
        """
        self.name(numbers[0])
        self.name(numbers[-1])
        prefix, suffix, width = self.prefix, self.suffix, self.width
        return [prefix + str(number).zfill(width) + suffix for number in numbers]  # a third of what a format takes


@record
class Wanted:
    """A call of `Store.fork`, checked as far as that goes without the store."""

    volume: str
    snapshot: str | None
    names: tuple[str, ...] | None
    count: int
    pattern: Pattern
    key: str | None
    lifetime_ns: int | None
    labels: Mapping[str, str]
    wipe: str | None
    ids: tuple[bytes, ...] | None = None  # of the new volumes; None: they are drawn

    def digest(self) -> bytes:
        """Return what tells the call from another one under the same key."""
        import json
        from hashlib import sha256

        asked = [
            *(self.volume, self.snapshot, self.names, self.count, self.lifetime_ns, self.wipe),
            [self.pattern.prefix, self.pattern.suffix, self.pattern.width],
            sorted(self.labels.items()),
        ]
        return sha256(json.dumps(asked).encode()).digest()


class DoneBeforeError(Exception):
    """The forks were made by a call with the same key, which came between."""

    def __init__(self, names: list[str]) -> None:
        super().__init__("these forks were made before")
        self.names = names


# ---- what is asked for ----


def split_source(source: str, snapshot: str | None) -> tuple[str, str | None]:
    """Take "web@clean" apart, where the snapshot is not given by itself."""
    if not isinstance(source, str):
        raise TypeError(f"what is forked is a text such as 'web@clean' or 'web', not {source!r}")
    volume, at, behind = str(source).partition("@")
    if at and (snapshot is not None or not behind):
        raise ValueError(f"{source!r} is not the name of a volume, nor VOLUME@SNAPSHOT")
    return volume, behind if at else snapshot


def check_wanted(
    source: str,
    snapshot: str | None,
    names: Sequence[str] | None,
    count: int | None,
    pattern: str | None,
    key: str | None,
    lifetime: "str | float | timedelta | None",
    labels: Mapping[str, str] | None,
    wipe: str | None,
) -> Wanted:
    """Check the arguments of a fork."""
    volume, snapshot = split_source(source, snapshot)
    checked = None if names is None else _check_names(names, count, pattern)
    if wipe is not None and wipe not in WIPE_POLICIES:
        raise ValueError(f"the wipe policy is 'release' or 'zero', not {wipe!r}")
    return Wanted(
        volume,
        snapshot,
        checked,
        _check_count(1 if count is None else count) if checked is None else len(checked),
        parse_pattern(DEFAULT_PATTERN if pattern is None else pattern, volume),
        None if key is None else check_key(key),
        None if lifetime is None else parse_duration(lifetime),
        check_labels(labels or {}),
        wipe,
    )


def _check_names(names: Sequence[str], count: int | None, pattern: str | None) -> tuple[str, ...]:
    if isinstance(names, str | bytes):
        raise TypeError(f"names is a list of names, such as [{names!r}]")
    found = tuple(check_name("volume", name) for name in names)
    if pattern is not None or count not in (None, len(found)):
        raise ValueError("names are given, or a count and a pattern that makes them, not both")
    if len(set(found)) != len(found):
        raise ValueError("a name is given twice, and each fork has its own")
    _check_count(len(found))
    return found


def check_key(key: str) -> str:
    """Return a key that a call may have: a text of the caller's own, such as the address of a task."""
    if not isinstance(key, str):
        raise TypeError(f"a key is a text, not {key!r}")
    key = str(key)
    if not key or not key.isprintable() or len(key.encode(errors="replace")) > NAME_BYTES_MAX:
        raise ValueError(f"{key!r} cannot be a key: it has 1 to {NAME_BYTES_MAX} bytes that print on a line")
    return key


def _check_count(count: int) -> int:
    if isinstance(count, bool):
        raise TypeError("a count is a number, not a bool")
    count = operator.index(count)
    if not 1 <= count <= FORKS_MAX:
        raise ValueError(f"one call makes 1 to {FORKS_MAX:,} forks, not {count}")
    return count


def parse_pattern(text: str, source: str) -> Pattern:
    """Read a pattern such as "job-{n:03}": {n} once, with a width if one is wanted, and {source} as often as it likes.

    Nothing is looked up by it: a pattern may come from anybody.
    """
    parts: list[str] = [""]
    width = 1
    for literal, field, spec, conversion in _fields(text):
        parts[-1] += literal
        if field == "source" and not spec and not conversion:
            parts[-1] += source
        elif field == "n" and not conversion:
            width = _width(text, spec or "")
            parts.append("")
        elif field is not None:
            raise ValueError(f"the pattern {text!r} has a field other than {{n}}, {{n:03}} and {{source}}")
    if len(parts) != 2:
        raise ValueError(f"the pattern {text!r} has not one {{n}}, the number that tells the forks apart")
    return Pattern(parts[0], parts[1], width)


def _fields(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    if not isinstance(text, str):
        raise TypeError(f"a pattern is a text such as 'job-{{n}}', not {text!r}")
    from string import Formatter

    if not is_text(text):
        raise ValueError(f"the pattern {text!r} is not text that UTF-8 can hold")
    try:
        return list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"the pattern {text!r} cannot be read: {error}; write '{{{{' for a brace") from None


def _width(text: str, spec: str) -> int:
    digits = spec.removeprefix("0")
    if not spec:
        return 1
    if spec == digits or len(digits) > 2 or not (digits.isascii() and digits.isdigit()) or int(digits) > 18:
        raise ValueError(
            f"the pattern {text!r} pads the number otherwise than with zeros, to 18 digits at most: {{n:03}}"
        )
    return max(int(digits), 1)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels that a volume may have; else raise TypeError or ValueError."""
    refuse_no_mapping(labels)
    found = {}
    for key, value in labels.items():
        key = check_name("label", key)
        if "=" in key:
            raise ValueError(f"{key!r} cannot be the name of a label: '=' stands between it and its value")
        if not isinstance(value, str):
            raise TypeError(f"the value of the label {key!r} is a text, not {value!r}")
        if len(value.encode(errors="replace")) > NAME_BYTES_MAX or not (value.isprintable() or not value):
            raise ValueError(f"the value of the label {key!r} is at most {NAME_BYTES_MAX} bytes that print on a line")
        found[key] = str(value)
    if len(found) > LABELS_MAX:
        raise ValueError(f"a volume has at most {LABELS_MAX} labels, not {len(found)}")
    return found


# ---- making them ----


def fork_snapshot(store: OpenStore, wanted: Wanted) -> list[str]:
    """Make forks of a snapshot."""
    assert wanted.snapshot is not None
    catalog, snapshot = store.catalog, wanted.snapshot

    def change() -> list[str]:
        if (made := made_before(store, wanted)) is not None:
            return made
        volume = catalog.volume(wanted.volume)
        row = find_snapshot(catalog, volume, snapshot)
        return _insert(store, wanted, volume, row, catalog.layer(row.layer))

    return store.change(change)


def fork_head(volume: OpenHead, wanted: Wanted, check: Callable[[], None] = lambda: None) -> list[str]:
    """Make forks of the disk as it is now: on its head, sealed without a name, or below an empty one.

    `check` is called in the transaction, and raises where nobody waits for the forks any more.
    """
    store = volume.store
    names: list[str] = []

    def insert(layer: LayerRow) -> None:
        check()
        names[:] = _fork_locked(store, volume.row.id, wanted, layer)

    with volume.operation(during_merge=True):
        volume.refuse_half_merged()
        flush(volume)
        try:
            if volume.path.log_state()[1] == 0 and fork_below(store, volume.head, volume.size_bytes, insert):
                return names
            with store.catalog.reading():  # before anything is sealed: a seal that is taken back leaves a segment more
                _source(store, volume.row.id, wanted)
                _free_names(store, wanted)
            sealed = seal(volume, check=volume.refuse_half_merged, also=lambda sealed, head: insert(sealed))
        except DoneBeforeError as done:
            return done.names
        fold_where_unnamed(volume, [sealed.parent])  # the cut before this one, where nothing else stands on it any more
    return names


def fork_unwritten(store: OpenStore, volume: VolumeRow, wanted: Wanted) -> list[str] | None:
    """Fork a volume that is locked and not open, if nothing is in its head; None: it has to be opened."""
    head = store.catalog.layer(volume.head)
    if not is_unwritten(store, volume.id, head):
        return None
    names: list[str] = []

    def insert(below: LayerRow) -> None:
        names[:] = _fork_locked(store, volume.id, wanted, below)

    try:
        return names if fork_below(store, head.id, head.size_bytes, insert) else None
    except DoneBeforeError as done:
        return done.names


def _source(store: OpenStore, volume: bytes, wanted: Wanted) -> VolumeRow:
    """Return the row of a volume that is held, if its name still means it, and the call was not made before."""
    if (made := made_before(store, wanted)) is not None:
        raise DoneBeforeError(made)
    named = store.catalog.volume(wanted.volume)
    if named.id != volume:
        raise StateError(f"volume {wanted.volume!r} was renamed meanwhile; try again")
    return named


def _fork_locked(store: OpenStore, volume: bytes, wanted: Wanted, layer: LayerRow) -> list[str]:
    """Write the rows of forks of a volume that is held. Inside a transaction."""
    named = _source(store, volume, wanted)
    snapshot = store.catalog.snapshot_of_layer(layer.id)
    is_own = snapshot and snapshot.volume == volume  # and not the one that it began as
    return _insert(store, wanted, named, snapshot if is_own else None, layer)


def fold_what_stays(store: OpenStore, layers: Iterable[bytes]) -> None:
    """Fold layers without a name that forks stood on, in the volumes over them that are open here.

    That was not asked for, and the next opening does what is left.
    """
    for layer in dict.fromkeys(layers):
        head = _head_over(store, layer)
        if head is None:
            continue
        with suppress(OSError, OnionskinError):
            head.if_idle(partial(_fold, head, layer))


def _fold(head: OpenHead, layer: bytes) -> None:
    around = unnamed_around(head.store.catalog, layer)
    fold_where_unnamed(head, [layer])
    free_hidden(head, around)


def _head_over(store: OpenStore, layer: bytes) -> OpenHead | None:
    """Return the head that is open here over a layer without a name, where nothing branches off between the two."""
    catalog = store.catalog
    if catalog.is_named(layer):
        return None
    with catalog.reading():
        above = catalog.only_child_of(layer)
        while above is not None and above.sealed:
            above = catalog.only_child_of(above.id)
    for handle in store.open_handles():
        if above and isinstance(handle, OpenHead) and handle.head == above.id:
            return handle
    return None


def fork_below(store: OpenStore, head: bytes, size_bytes: int, insert: Callable[[LayerRow], None]) -> bool:
    """Put forks on what a head stands on, to which it has added nothing; False where it has to be sealed all the same.

    The volume of the head is held. What is written to it from now on is not in the forks.
    """
    before = _below(store, head)

    def change() -> bool:
        if not before or before[-1].size_bytes != size_bytes or _below(store, head) != before:
            return False
        insert(before[-1])
        return True

    return store.change(change) if before else False


def _below(store: OpenStore, head: bytes) -> list[LayerRow]:
    """Return what a head stands on, bottom first: what may be given up while others hide it is in it."""
    with store.catalog.reading():
        chain = store.catalog.chain(head)[:-1]
        is_kept = chain and store.catalog.is_named(chain[-1].id)
    return chain[-1:] if is_kept else chain


def made_before(store: OpenStore, wanted: Wanted) -> list[str] | None:
    """Return the names that a call with the same key made within a day, or None.

    Raises
    ------
    StateError
        That call had other arguments.
    """
    return None if wanted.key is None else made_under(store, wanted.key, wanted.digest())


def made_under(store: OpenStore, key: str, digest: bytes) -> list[str] | None:
    """Return the names that a call with this key and digest made within a day: see `made_before`."""
    made = call_under(store, key, digest)
    return None if made is None else list(made.names)


def call_under(store: OpenStore, key: str, digest: bytes) -> "Made | None":
    """Return what a call with this key and digest made within a day: see `made_before`."""
    found, now_ns = store.catalog.fork_call(key), time.time_ns()
    if found is None:
        return None
    made = _made_by(store, found)
    if _is_forgotten(found, made.since_boot, now_ns):
        return None
    if found.digest != digest and found.created_ns > now_ns + KEY_NANOSECONDS and not made.is_of_this_boot:
        return None  # the clock was wrong then, and the key would be refused until that time has come
    if found.digest != digest:
        raise StateError(f"the key {key!r} was used for another fork within a day; give each fork its own key")
    return made


@record
class SinceBoot:
    """A time by the clock that nobody sets, and the boot of the machine that it counts from."""

    boot: str
    nanoseconds: int

    @classmethod
    def now(cls) -> "SinceBoot":
        """Return this time. It goes on while the machine is asleep."""
        return cls(_boot_id(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))


@lru_cache(1)
def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""  # no boot has this id, so the clock that tells the date counts alone


@record
class Made:
    """What a call under a key made: names, and where they are noted the ids; and when, by the clock that nobody sets."""

    names: tuple[str, ...]
    ids: tuple[bytes, ...] | None
    since_boot: SinceBoot | None

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the clock that nobody sets can tell how long ago that was."""
        return self.since_boot is not None and bool(self.since_boot.boot) and self.since_boot.boot == _boot_id()


def _is_forgotten(call: ForkCallRow, since_boot: SinceBoot | None, now_ns: int) -> bool:
    """Whether a call was a day ago or more.

    In the boot that it was made in, the clock that nobody sets says so: while the clock that tells the date is a day ahead,
    no key may be forgotten, since the same call again would make the forks twice. Behind a restart that one counts alone.
    """
    now = SinceBoot.now()
    if since_boot is not None and now.boot and since_boot.boot == now.boot:
        return now.nanoseconds - since_boot.nanoseconds > KEY_NANOSECONDS
    return call.created_ns < now_ns - KEY_NANOSECONDS


def _as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("it is no list")
    return value


def _made_by(store: OpenStore, call: ForkCallRow) -> Made:
    """Read what a call noted: an object, or a list of the names, as older ones noted it."""
    import json

    try:
        noted = json.loads(call.names)
        if isinstance(noted, list):
            noted = {"names": noted}
        names, ids, boot = noted["names"], noted.get("ids"), noted.get("boot")
        made = Made(
            tuple(_as_list(names)),
            None if ids is None else tuple(map(bytes.fromhex, ids)),
            None if boot is None else SinceBoot(str(boot), int(noted["boot_ns"])),
        )
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError):
        made = None
    if (
        made is None
        or not all(isinstance(name, str) for name in made.names)
        or (made.ids is not None and len(made.ids) != len(made.names))
    ):
        raise damaged(store.catalog.path, f"what was forked under the key {call.key!r} is no list of names")
    return made


def _insert(
    store: OpenStore, wanted: Wanted, source: VolumeRow, snapshot: SnapshotRow | None, layer: LayerRow
) -> list[str]:
    """Write the rows of forks that begin as a layer. Inside a transaction."""
    names = _free_names(store, wanted)
    insert_named(store, wanted, names, source, snapshot, layer)
    if wanted.key is not None:
        note_call(store, wanted.key, wanted.digest(), names)
    return names


def insert_named(
    store: OpenStore,
    wanted: Wanted,
    names: Sequence[str],
    source: VolumeRow,
    snapshot: SnapshotRow | None,
    layer: LayerRow,
) -> None:
    """Write the rows of forks with these names, which are free. Inside a transaction."""
    catalog = store.catalog
    now_ns = time.time_ns()
    expires_ns = None if wanted.lifetime_ns is None else end_of(now_ns, wanted.lifetime_ns)
    first = NewHead.on(
        layer,
        base=None,
        block_size=layer.block_size,
        wipe=wanted.wipe or layer.wipe,
        size_bytes=layer.size_bytes,
    )
    heads = insert_copies(catalog, first.layer._replace(created_ns=now_ns), len(names))
    ids = wanted.ids or new_ids(len(names))
    catalog.insert_copies(VolumeRow(ids[0], names[0], heads[0], now_ns, expires_ns), id=ids, name=names, head=heads)
    lineage.begin_forks(catalog, ids, names, now_ns, source.id, snapshot)
    # In the order of the table, which has many rows then: out of order each one reads and writes a page of its own.
    labels = sorted(wanted.labels.items())
    catalog.insert_all(LabelRow(id, key, value) for id in sorted(ids) for key, value in labels)


def note_call(
    store: OpenStore, key: str, digest: bytes, names: Sequence[str], ids: Sequence[bytes] | None = None
) -> None:
    """Write down what a call under a key made, and forget the keys of another day. Inside its transaction.

    `ids` are those of what was made, where the same call again has to find that, whatever it is called by then.
    """
    import json

    now_ns, since_boot = time.time_ns(), SinceBoot.now()
    noted: dict[str, object] = {"names": list(names)}
    if ids is not None:
        noted["ids"] = [id.hex() for id in ids]
    if since_boot.boot:
        noted |= {"boot": since_boot.boot, "boot_ns": since_boot.nanoseconds}
    _forget_old_calls(store, now_ns)
    store.catalog.remember_fork_call(ForkCallRow(key, digest, json.dumps(noted), now_ns))


def _forget_old_calls(store: OpenStore, now_ns: int) -> None:
    """Forget the keys of another day. Inside a transaction."""
    gone = []
    for call in store.catalog.fork_calls_before(now_ns - KEY_NANOSECONDS):
        try:
            since_boot = _made_by(store, call).since_boot
        except FormatError:
            since_boot = None
        if _is_forgotten(call, since_boot, now_ns):
            gone.append(call.key)
    store.catalog.forget_fork_calls(gone)


def _free_names(store: OpenStore, wanted: Wanted) -> list[str]:
    """Return the names that were given, or those with the next numbers; none of them is taken."""
    pattern = wanted.pattern
    if wanted.names is not None:
        names = list(wanted.names)
    else:
        names = pattern.names(next_numbers(store, [pattern], wanted.count))
    refuse_taken(store, names)
    return names


def next_numbers(store: OpenStore, patterns: Sequence[Pattern], count: int) -> range:
    """Return so many numbers behind the greatest that the name of a volume has by one of the patterns."""
    last, pattern = max(
        ((store.catalog.greatest_number(one.prefix, one.suffix), one) for one in patterns), key=lambda found: found[0]
    )
    if last + count > NUMBER_MAX:
        raise StateError(
            f"the numbers of {pattern.name(last)!r} go up to {NUMBER_MAX}, and those above {last} are not enough; "
            "choose another pattern"
        )
    return range(last + 1, last + count + 1)


def refuse_taken(store: OpenStore, names: Sequence[str]) -> None:
    """Raise VolumeExistsError if a volume has one of these names. Inside the transaction that gives them."""
    taken = sorted(row.name for row in store.catalog.volumes_named(names))
    if len(taken) == 1:
        raise VolumeExistsError(f"the store {store.path} already has a volume {taken[0]!r}; choose another name")
    if taken:
        raise VolumeExistsError(f"the store {store.path} already has volumes {some_of(taken)}; nothing was made")
