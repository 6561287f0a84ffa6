"""The table of verbs: what each does, as a list of operations (model.py) on a volume, through a handle.

A verb with `handle` needs its volume open for writing. One with `alone` needs that nobody has: beside it a verb with a
handle opens its volume, and closes it, as part of what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pairs.model import Operation

VOLUME_UNITS = 32
SNAPSHOTS = ("s1", "s2")
EXPIRED = "x"  # the volume whose lifetime is over when a run begins
UNWRITTEN = "u"  # a fork of v@s1 to which nothing was written


@dataclass(frozen=True)
class Place:
    """Where a verb is used: the volume, another one of the store, the handle, and numbers that are this actor's own."""

    actor: str
    volume: str
    other: str
    handle: str
    stamp: int

    @property
    def own(self) -> str:
        """A second handle."""
        return f"{self.actor}-own"


@dataclass(frozen=True)
class Verb:
    """One verb. `at_s2`: the head has to stand unchanged on the last snapshot. `both`: it uses the other volume too."""

    name: str
    program: Callable[[Place], list[Operation]]
    handle: bool = False
    alone: bool = False
    at_s2: bool = False
    both: bool = False
    reads: bool = False  # changes nothing


def _write(at: Place) -> list[Operation]:
    """Slots that a trim frees are used again by the writes behind it: what export_beside_writer does."""
    h, n = at.handle, at.stamp
    return [
        ("write", h, 4, n + 1, 2), ("flush", h), ("trim", h, 4, 2), ("trim", h, 22, 2), ("flush", h),
        ("write", h, 26, n + 2, 2), ("write", h, 13, n + 3, 1), ("flush", h), ("write", h, 4, n + 4, 2),
    ]  # fmt: skip


def _recreate(at: Place) -> list[Operation]:
    return [("delete", at.volume), ("create", at.own, at.volume, 8, None), ("held", at.own), ("close", at.own)]


def _open(at: Place) -> list[Operation]:
    return [
        ("open", at.own, at.volume), ("held", at.own), ("write", at.own, 6, at.stamp + 1, 2), ("snapshot", at.own, "o"),
        ("close", at.own),
    ]  # fmt: skip


def _view(at: Place) -> list[Operation]:
    return [("view", at.own, at.volume, "s1"), ("read", at.own, 0), ("close", at.own)]


def _export_view(at: Place) -> list[Operation]:
    return [("view", at.own, at.volume, "s2"), ("export", at.own, f"{at.actor}-view.img"), ("close", at.own)]


def _swap(at: Place) -> list[Operation]:
    """Two volumes change their names: a name that was looked up means another volume then."""
    return [("rename", at.volume, "t"), ("rename", at.other, at.volume), ("rename", "t", at.other)]


def _fork_head(at: Place) -> list[Operation]:
    """Twice: the second time the head is empty, where nobody writes."""
    return [("fork", at.volume, None, (f"{at.actor}1", "n")), ("fork", at.volume, None, (f"{at.actor}2",))]


def _temporary(snap: str | None) -> Callable[[Place], list[Operation]]:
    return lambda at: [
        ("temporary", at.own, at.volume, snap, "n"), ("write", at.own, 6, at.stamp + 1, 2), ("end_temporary", at.own),
    ]  # fmt: skip


def _open_expired(at: Place) -> list[Operation]:
    return [("open", at.own, EXPIRED), ("write", at.own, 2, at.stamp + 1, 2), ("flush", at.own), ("close", at.own)]


def _write_unwritten(at: Place) -> list[Operation]:
    """It is read through a view at first, and its head is opened by the first write."""
    return [
        ("open", at.own, UNWRITTEN), ("read", at.own, 0), ("write", at.own, 2, at.stamp + 1, 2), ("read", at.own, 0),
        ("flush", at.own), ("snapshot", at.own, at.actor), ("close", at.own),
    ]  # fmt: skip


def _fork_unwritten(at: Place) -> list[Operation]:
    return [("fork", UNWRITTEN, None, ("n",)), ("fork", UNWRITTEN, None, (f"{at.actor}2",))]


def _look(at: Place) -> list[Operation]:
    h = at.handle
    return [("parent", h), ("changed", h), ("extents", h), ("own_diff", h, "s1"), ("own_usage", h), ("own_layering", h)]


def _swap_snapshots(at: Place) -> list[Operation]:
    """Two snapshots change their names: one that was looked up means another disk then."""
    return [
        ("rename_snapshot", at.volume, "s1", "t"), ("rename_snapshot", at.volume, "s2", "s1"),
        ("rename_snapshot", at.volume, "t", "s2"),
    ]  # fmt: skip


def _let_go(at: Place) -> list[Operation]:
    return [("hold", at.volume, "s2", at.actor), ("holds", at.volume), ("unhold", at.volume, "s2", at.actor)]


def _on(name: str, *arguments: object) -> Callable[[Place], list[Operation]]:
    return lambda at: [(name, at.handle, *arguments)]


def _of(name: str, *arguments: object) -> Callable[[Place], list[Operation]]:
    return lambda at: [(name, at.volume, *arguments)]


VERBS = [
    Verb("write", _write, handle=True),
    Verb("read", _on("read", 0), handle=True, reads=True),
    Verb("snapshot", lambda at: [("write", at.handle, 8, at.stamp + 1, 2), ("snapshot", at.handle, "new")], handle=True),
    Verb("snapshots", lambda at: [("snapshot", at.handle, f"{at.actor}1"), ("write", at.handle, 8, at.stamp + 1, 2),
                                  ("snapshot", at.handle, f"{at.actor}2"),
                                  ("write", at.handle, 10, at.stamp + 2, 2), ("flush", at.handle)], handle=True),
    Verb("revert", _on("revert", "s1"), handle=True),
    Verb("discard", _on("discard", "s2", False), handle=True),
    Verb("discard all", _on("discard", "s1", True), handle=True),
    Verb("merge", _on("merge", "s2"), handle=True),
    Verb("merge older", _on("merge", "s1"), handle=True),
    Verb("merge into base", _on("merge_base", "s1"), handle=True),
    Verb("flatten", _on("flatten"), handle=True),
    Verb("export", lambda at: [("export", at.handle, f"{at.actor}.img")], handle=True, reads=True),
    Verb("grow", lambda at: [("resize", at.handle, 40), ("write", at.handle, 36, at.stamp + 1, 2)], handle=True),
    Verb("shrink", _on("resize", 20), handle=True),
    Verb("apply", _on("apply"), handle=True, at_s2=True),
    Verb("close", lambda at: [("write", at.handle, 8, at.stamp + 1, 2), ("close", at.handle)], handle=True),
    Verb("open", _open, alone=True),
    Verb("view", _view, reads=True),
    Verb("export view", _export_view, reads=True),
    Verb("create", lambda at: [("create", at.own, "n", 8, None), ("held", at.own), ("close", at.own)]),
    Verb("create on base", lambda at: [("create", at.own, "n", VOLUME_UNITS, "base.img"), ("read", at.own, 0),
                                       ("close", at.own)]),
    Verb("import", lambda at: [("import", "import.img", "n")]),
    Verb("delta", _of("delta", "s1", "s2"), reads=True),
    Verb("full delta", _of("delta", None, "s2"), reads=True),
    Verb("clone", lambda at: [("clone", at.volume, "s2", "n")]),
    Verb("fork", _of("fork", "s2", ("n", "n2"))),
    Verb("fork numbered", _of("fork_numbered", "s2", 2)),
    Verb("fork with key", _of("fork_with_key", "s2", "k", 2)),
    Verb("fork head", _fork_head),
    Verb("fork head with key", _of("fork_with_key", None, "k", ("n", "n2"))),
    Verb("fork expired", lambda at: [("fork", EXPIRED, None, ("n",)), ("fork", EXPIRED, None, (f"{at.actor}2",))]),
    Verb("temporary", _temporary("s2")),
    Verb("temporary head", _temporary(None)),
    Verb("snapshot group", lambda at: [("snapshot_group", (at.volume, at.other), "new")], both=True),
    Verb("take hold", lambda at: [("hold", at.volume, "s1", at.actor), ("holds", at.volume)]),
    Verb("let go", _let_go),
    Verb("swap snapshots", _swap_snapshots),
    Verb("note", _of("set_note", "s2", "a note")),
    Verb("prune", _of("prune"), alone=True),
    Verb("prune open", lambda at: [("write", at.handle, 8, at.stamp + 1, 2), ("prune_open", at.handle)], handle=True),
    Verb("set wipe", _of("set_wipe"), alone=True),
    Verb("set defaults", lambda at: [("set_defaults",)]),
    Verb("fork group", lambda at: [("fork_group", ((at.volume, "s2"), (at.other, "s1")))], both=True),
    Verb("fork group of heads", lambda at: [("fork_group", ((at.volume, None), (at.other, None)))], both=True),
    Verb("import a stream", lambda at: [("import_stream", "import.img", "n")]),
    Verb("compare", lambda at: [("compare", (at.volume, "s2"), (at.other, "s1"))], both=True, reads=True),
    Verb("delta across", lambda at: [("delta_across", (at.other, "s1"), (at.volume, "s2"))], both=True, reads=True),
    Verb("expire", lambda at: [("expire",)]),
    Verb("open expired", _open_expired),
    Verb("write unwritten", _write_unwritten),
    Verb("fork unwritten", _fork_unwritten),
    Verb("group unwritten", lambda at: [("snapshot_group", (UNWRITTEN, at.other), "new")], both=True),
    Verb("look", _look, handle=True, reads=True),
    Verb("usage of forks", _of("usage_of_forks"), reads=True),
    Verb("delete several", lambda at: [("delete_several", (at.volume, at.other))], alone=True, both=True),
    Verb("delete", _of("delete"), alone=True),
    Verb("recreate", _recreate, alone=True),
    Verb("rename", _of("rename", "n"), alone=True),
    Verb("swap", _swap, alone=True),
    Verb("relocate", _of("relocate", "moved.img")),
    Verb("diff", _of("diff", "s1", "s2"), reads=True),
    Verb("diff head", _of("diff", "s1", None), reads=True),
    Verb("usage", _of("usage"), reads=True),
    Verb("layering", _of("layering", "s2"), reads=True),
    Verb("layering head", _of("layering", None), reads=True),
    Verb("check", lambda at: [("check",)], reads=True),
    Verb("repair", lambda at: [("repair",)]),
    Verb("tree", lambda at: [("tree",), ("volumes",)], reads=True),
    Verb("store", lambda at: [("store",)]),
]  # fmt: skip
BY_NAME = {verb.name: verb for verb in VERBS}
# On a volume that nobody stands on, else they are always refused.
NEEDS_CLONE = {"delete", "delete several", "recreate"}


def program(verb: Verb, at: Place, *, opens: bool) -> list[Operation]:
    """Return what a verb does at a place; with `opens` it opens the volume for it, and closes it."""
    if not (verb.handle and opens):
        return verb.program(at)
    at = Place(at.actor, at.volume, at.other, at.own, at.stamp)
    inner = verb.program(at)
    closes = [] if inner[-1][0] == "close" else [("close", at.own)]
    return [("open", at.own, at.volume), ("held", at.own), *inner, *closes]
