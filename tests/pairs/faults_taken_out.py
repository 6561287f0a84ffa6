"""Takes each fix of a race out of the engine, one at a time, and says whether the harness of pairs finds the race again.

    python -m pairs.faults_taken_out [--only NAME ...] [SOURCE_TREE]

A fix is taken out by replacing a piece of a source file by what was there before it, or by what a hasty hand would write.
The tree is copied, the copy is changed, extensions are built again where C was changed, and the pairs that are named are
tried at every step until one is violated. A fault that is not found, or whose text is not in its file any more, makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from crash.harness.drop_each_barrier import build, copy_tree

TREE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Edit:
    """A piece of a file, which is there once, and what is put in its place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """A fix to take out, and the arguments of `python -m pairs` with which the race must be found."""

    name: str
    edits: tuple[Edit, ...]
    arguments: tuple[str, ...]


def _pairs(first: str, second: str, relation: str, place: str, wipe: str, fault: str = "none") -> tuple[str, ...]:
    return (
        "--all", "--stop", "--first", first, "--second", second, "--relation", relation, "--place", place,
        "--wipe", wipe, "--fault", fault,
    )  # fmt: skip


FAULTS = [
    Fault(
        "A1: each opening sweeps what it takes for orphans, read in several statements",
        (
            Edit(
                "src/onionskin/store.py",
                "with suppress(OSError, OnionskinError):\n            if self._opened.catalog.staged_volumes():\n                from onionskin.operations import staged_volumes\n\n                staged_volumes.drop_dead(self._opened)\n",
                "reclaim.remove_orphans(self._opened)\n",
            ),
            Edit(
                "src/onionskin/operations/reclaim.py",
                "        with store.catalog.transaction():\n            for path in [] if",
                "        if held:\n            for path in [] if",
            ),
            Edit(
                "src/onionskin/operations/reclaim.py",
                "    with catalog.reading():\n        work = catalog.all_sound(WorkRow)",
                "    if catalog:\n        work = catalog.all_sound(WorkRow)",
            ),
        ),
        _pairs("open", "snapshots", "other", "threads", "release"),
    ),
    Fault(
        "A2: flatten puts an empty head over the copy",
        (
            Edit(
                "src/onionskin/operations/flatten.py",
                """    with volume.changing_below(lambda: catalog.layer(volume.head).parent == flat.id):
        volume.path.prepare_below(base_fd=None, base_bytes=0, layer=source, dropped=below)
        store.change(switch)
""",
                """    def put() -> None:
        files.keep()
        catalog.insert(flat)
        for row in segments:
            catalog.insert(row)

    store.change(put)
    restart_on(volume, flat.id, lambda: None)
""",
            ),
            Edit(
                "src/onionskin/operations/flatten.py",
                "from onionskin.operations.seal import",
                "from onionskin.operations.restart import restart_on\nfrom onionskin.operations.seal import",
            ),
        ),
        _pairs("flatten", "write", "same", "threads", "release"),
    ),
    Fault(
        "A4: an opening believes what the name meant before the lock was held",
        (
            Edit(
                "src/onionskin/store.py",
                "                if row.id == id:\n                    if isinstance(lock",
                "                if True:\n                    if isinstance(lock",
            ),
        ),
        _pairs("open", "swap", "same", "processes", "release"),
    ),
    Fault(
        "A4: delete removes the head that was read before the lock was held",
        (
            Edit(
                "src/onionskin/operations/volumes.py",
                "        ids = ids_of(catalog, wanted)\n",
                "        early = [catalog.volume(name) for name in wanted]\n"
                "        ids = {row.name: row.id for row in early}\n",
            ),
            Edit(
                "src/onionskin/operations/volumes.py",
                "        return remove_volumes(store, list(ids.values()), recursive=recursive)\n",
                "        return remove_volumes(store, list(ids.values()), recursive=recursive, early=early)\n",
            ),
            Edit(
                "src/onionskin/operations/volumes.py",
                "def remove_volumes(store: OpenStore, ids: Sequence[bytes], *, recursive: bool)",
                "def remove_volumes(store: OpenStore, ids: Sequence[bytes], *, recursive: bool, early=None)",
            ),
            Edit(
                "src/onionskin/operations/volumes.py",
                "    rows = catalog.volumes_with_ids(ids)\n",
                "    rows = early or catalog.volumes_with_ids(ids)\n",
            ),
        ),
        _pairs("delete", "revert", "same", "processes", "release"),
    ),
    Fault(
        "A4: delete removes a volume that lost its name once it was locked",
        (
            Edit(
                "src/onionskin/operations/volumes.py",
                "        if ids_of(catalog, wanted) != ids:\n",
                "        if False:\n",
            ),
        ),
        _pairs("swap", "delete", "other", "stores", "zero"),
    ),
    Fault(
        "A9: a commit whose sync failed is left in the log",
        (Edit("src/onionskin/catalog/connection.py", "not self._bury(error) and was_unknown", "was_unknown"),),
        _pairs("snapshot", "write", "same", "threads", "release", "unsynced"),
    ),
    Fault(
        "A5: what a merge into the base has dropped is wiped while a read still copies from it",
        (
            Edit(
                "src/onionskin/storage/open_head.py",
                """            elif self._goes_on_below():
                with suppress(OSError, OnionskinError):  # if this fails, the old files stay locked until the next time
                    self.leave_base()
                    self.give_up_unread()
""",
                """            else:
                from onionskin.operations import reclaim

                self.locks.keep_shared(read_chain(self.store.catalog, self.head).lock_bytes)
                reclaim.do_work(self.store)
                self.path.commit_below()
""",
            ),
        ),
        _pairs("read", "merge into base", "same", "threads", "zero"),
    ),
    Fault(
        "A6: a base is relocated while a merge writes it",
        (
            Edit("src/onionskin/store.py", "        if is_being_merged_into(FilePath(old.path)):", "        if False:"),
            Edit(
                "src/onionskin/store.py",
                "refuse_half_merged(catalog, FilePath(new.path), above=read_chain(catalog, row.head))",
                "pass",
            ),
            Edit(
                "src/onionskin/operations/merge_into_base.py",
                " or (base.id, base.path) != (folded.base.id, folded.base.path):",
                ":",
            ),
            Edit(
                "src/onionskin/operations/merge_into_base.py",
                "        check_is_base(base, lock, half_merged=True)\n        if catalog.layer",
                "        if catalog.layer",
            ),
        ),
        _pairs("merge into base", "relocate", "same", "threads", "release"),
    ),
    Fault(
        "A6: a copy out of a disk whose base is half merged asks the row of the base",
        (
            Edit(
                "src/onionskin/storage/shared_paths.py",
                "    expected = opened.base_looks or looks_in(base)",
                "    expected = looks_in(base)",
            ),
        ),
        _pairs("merge into base", "store", "same", "processes", "release", "kill first"),
    ),
    Fault(
        "A7: an export reads a head that others write",
        (
            Edit(
                "src/onionskin/operations/export.py",
                "    with pinned(volume) as opened, new_image(",
                "    chain = read_chain(volume.store.catalog, volume.head)\n"
                "    live = OpenChain(chain, volume.path, volume.locks, volume.base_lock)\n"
                "    with nullcontext(live) as opened, new_image(",
            ),
            Edit(
                "src/onionskin/operations/export.py",
                "from onionskin.operations.pinned import pinned\n",
                "from contextlib import nullcontext\nfrom onionskin.storage.chain import read_chain\n"
                "from onionskin.storage.shared_paths import OpenChain\n",
            ),
        ),
        _pairs("export", "write", "same", "threads", "release"),
    ),
    Fault(
        "A9: an import gives the volume its name before its data is there",
        (
            Edit(
                "src/onionskin/images.py",
                "        self._made.publish()\n",
                "        from onionskin.operations.flush import flush\n\n        flush(self._made.head)\n",
            ),
            Edit(
                "src/onionskin/images.py",
                "        return Volume(self._made.head)\n",
                "        self._made.publish()\n        return Volume(self._made.head)\n",
            ),
        ),
        _pairs("import", "tree", "other", "processes", "release", "kill last"),
    ),
    Fault(
        "fork: the next number is asked before the transaction",
        (
            Edit(
                "src/onionskin/operations/forks.py",
                "        return _insert(store, wanted, volume, row, catalog.layer(row.layer))\n\n",
                "        return _insert(store, wanted, volume, row, catalog.layer(row.layer), early)\n\n"
                "    early = _free_names(store, wanted)\n",
            ),
            Edit(
                "src/onionskin/operations/forks.py",
                "snapshot: SnapshotRow | None, layer: LayerRow\n)",
                "snapshot: SnapshotRow | None, layer: LayerRow, early=None\n)",
            ),
            Edit(
                "src/onionskin/operations/forks.py",
                "    names = _free_names(store, wanted)\n",
                "    names = early or _free_names(store, wanted)\n",
            ),
        ),
        _pairs("fork numbered", "fork numbered", "same", "processes", "release"),
    ),
    Fault(
        "fork: whether the key was used is asked before the transaction",
        (
            Edit(
                "src/onionskin/operations/forks.py",
                "    def change() -> list[str]:\n        if (made := made_before(store, wanted)) is not None:\n"
                "            return made\n",
                "    if (made := made_before(store, wanted)) is not None:\n        return made\n\n"
                "    def change() -> list[str]:\n",
            ),
        ),
        _pairs("fork with key", "fork with key", "same", "processes", "release"),
    ),
    Fault(
        "expire: whether anything comes from a volume is asked before it is locked",
        (
            Edit(
                "src/onionskin/operations/expiry.py",
                " and row.expires_ns <= now_ns and _may_go(store, row)\n",
                " and row.expires_ns <= now_ns\n",
            ),
        ),
        _pairs("expire", "fork expired", "other", "processes", "release"),
    ),
    Fault(
        "snapshot group: each volume gets its name in a transaction of its own",
        (
            Edit(
                "src/onionskin/operations/snapshots.py",
                "        seal_together(\n"
                "            store,\n"
                "            parts,\n"
                "            lambda: taken.extend(_write_names(store, namings)),\n"
                "            check=check_all,\n"
                "        )\n",
                "        for part, naming in zip(parts, namings, strict=True):\n"
                "            seal_together(store, [part], lambda one=naming: taken.extend(_write_names(store, [one])))\n",
            ),
        ),
        _pairs("snapshot group", "tree", "related", "stores", "release"),
    ),
    Fault(
        "an opening folds beside the operations of threads that found its handle",
        (
            Edit(
                "src/onionskin/store.py",
                "            with head.guard:  # other threads",
                "            if True:  # other threads",
            ),
            Edit(
                "src/onionskin/storage/open_head.py",
                "        with self.guard, DeferredInterrupt():\n            self._unresolved",
                "        with DeferredInterrupt():\n            self._unresolved",
            ),
        ),
        _pairs("open expired", "fork expired", "same", "threads", "release"),
    ),
    Fault(
        "a handle that a revert has not told yet is asked for its head",
        (
            Edit(
                "src/onionskin/storage/open_head.py",
                "return self.store.catalog.head_of(self.row) or self.head",
                "return self.head",
            ),
        ),
        (*_pairs("revert", "apply", "same", "threads", "release"), "--behind-commits"),
    ),
]


class EditError(Exception):
    """A piece that is to be replaced is not in its file, or more than once."""


def take_out(tree: Path, fault: Fault) -> None:
    """Change a copy of the tree."""
    for edit in fault.edits:
        path = tree / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise EditError(f"{fault.name}: {edit.file} has its piece {text.count(edit.old)} times; write it anew")
        path.write_text(text.replace(edit.old, edit.new))
    if any(not edit.file.endswith(".py") for edit in fault.edits):
        build(tree)


def is_found(tree: Path, fault: Fault) -> str | None:
    """Return the first violation that is found in a tree, or None."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tests}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pairs", *fault.arguments, "--seed", "1"]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or "orders" not in done.stdout:
        raise RuntimeError(f"{fault.name}: the harness failed by itself: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith("VIOLATION")]
    return found[0] if found else None


def built_tree(work: Path, source: Path) -> Path:
    """Copy a tree, with its extensions in place: those that are installed, where they are built from the same sources."""
    tree = work / "tree"
    copy_tree(source, tree)
    import onionskin

    installed = Path(onionskin.__file__).parent
    modules = list(installed.rglob("*.so"))
    if not modules:
        build(tree)
    for module in modules:
        shutil.copy(module, tree / "src" / "onionskin" / module.relative_to(installed))
    return tree


def main() -> int:
    """Print a line for each fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tree", nargs="?", type=Path, default=TREE)
    parser.add_argument("--only", action="append", help="the beginning of a name; may be repeated")
    given = parser.parse_args()
    missed = 0
    for fault in FAULTS:
        if given.only and not any(fault.name.startswith(name) for name in given.only):
            continue
        with tempfile.TemporaryDirectory(prefix="pairs.") as work:
            try:
                tree = built_tree(Path(work), given.tree)
                take_out(tree, fault)
                found = is_found(tree, fault)
            except EditError as error:
                found = None
                print(error)
        missed += found is None
        print(f"{'found' if found else 'NOT FOUND'}: {fault.name}: {(found or '-')[:200]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
