"""The program that is crashed: runs the steps of a plan on a store, with a marker before and after each.

    python -m crash.harness.workload ROOT SEED WIPE [STEPS]

SEED is a number, or the name of a script (crash.harness.scripts). ROOT holds the store and, for some seeds, base.raw,
which `prepare` puts there before the recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash.harness.model import BLOCK_BYTES, FORK_LABELS, MAIN, MAIN_CLONE, STEPS, Plan, Seed, plan
from crash.harness.run import Recording, mark, run

STORE = "kept/store"  # making it makes a directory on the way as well
BASE = "base.raw"
LIFETIME = 1e-9  # of forks that `expire` drops


def prepare(root: Path, steps: Plan) -> None:
    """Puts what is there before the first step below the root."""
    root.mkdir(parents=True, exist_ok=True)
    if steps.base is not None:
        (root / BASE).write_bytes(steps.base)


def record(root: Path, seed: Seed, wipe: str, step_count: int = STEPS, source: Path | None = None) -> Recording:
    """Runs a workload under the recorder, on the engine in `source` (a src/ directory) or the one in use."""
    prepare(root, plan(seed, wipe, step_count))
    command = [sys.executable, "-m", "crash.harness.workload", str(root), str(seed), wipe, str(step_count)]
    if source is not None:
        command[1:3] = ["-c", PROGRAM, str(source)]
    return run(command, root)


def lower_limits() -> None:
    """Lets segments be compacted of a layer that has three segments, which takes two of them; a merge into the base
    notes each block."""
    from onionskin.operations import compact_segments, merge_into_base

    merge_into_base.FIRST_STRETCH_BYTES = merge_into_base.STRETCH_BYTES_MIN = 1
    compact_segments.SEGMENTS_MAX, compact_segments.SEGMENTS_KEPT = 2, 1


PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from crash.harness.workload import main; main(sys.argv[1:])"


class Workload:
    """One method for each operation of a plan."""

    def __init__(self, root: Path, wipe: str, base: bytes | None) -> None:
        self.root = root
        self.wipe = wipe
        self.base = root / BASE if base is not None else None
        self.store: Any = None
        self.main: Any = None
        self.cloned: Any = None
        self.temporary: Any = None

    def create(self, size_bytes: int) -> None:
        import onionskin

        self.store = onionskin.Store(self.root / STORE)
        self.main = self.store.create(MAIN, base=self.base, size=size_bytes, block_size=BLOCK_BYTES, wipe=self.wipe)

    def write(self, offset: int, data: bytes) -> None:
        self.main.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self.main.zero(offset, length)

    def trim(self, offset: int, length: int) -> None:
        self.main.trim(offset, length)

    def flush(self) -> None:
        self.main.flush()

    def expect_seal(self) -> None:
        self.main._opened.expect_seal()
        self.store.finish_work()

    def snapshot(self, name: str) -> None:
        self.main.snapshot(name)

    def revert(self, name: str) -> None:
        self.main.revert(name)

    def discard(self, name: str) -> None:
        self.main.discard(name, recursive=True)

    def merge(self, name: str) -> None:
        self.main.merge(name)

    def resize(self, size_bytes: int) -> None:
        self.main.resize(size_bytes, force=True)

    def clone(self, name: str) -> None:
        self.store.clone(MAIN, name, MAIN_CLONE)

    def open_clone(self, name: str, offset: int, data: bytes) -> None:
        self.cloned = self.store.open(name)
        self.cloned.write(offset, data)

    def close_clone(self) -> None:
        self.cloned.close()

    def delete_clone(self) -> None:
        self.store.delete(MAIN_CLONE, recursive=True)

    def fork(self, source: str, names: tuple[str, ...], expires: bool) -> None:
        lifetime = LIFETIME if expires else None
        labels, key = dict(FORK_LABELS), names[0]
        made = self.store.fork(source, names=names, labels=labels, lifetime=lifetime, idempotency_key=key)
        assert made == list(names)

    def expire(self, *gone: str) -> None:
        assert self.store.expire() == list(gone)

    def open_temporary(self, name: str, source: str) -> None:
        self.temporary = self.store.temporary(source, name=name)
        self.cloned = self.temporary.__enter__()

    def write_temporary(self, offset: int, data: bytes) -> None:
        self.cloned.write(offset, data)

    def close_temporary(self) -> None:
        self.temporary.__exit__(None, None, None)

    def delete_several(self, *names: str) -> None:
        self.store.delete(*names, recursive=True)

    def snapshot_group(self, name: str, other: str) -> None:
        self.store.snapshot_group({MAIN: name, other: name})

    def reopen(self) -> None:
        import onionskin

        self.main.close()
        self.store.close()
        self.store = onionskin.Store(self.root / STORE, create=False)
        self.main = self.store.open(MAIN)

    def merge_into_base(self, upto: str | None) -> None:
        self.main.merge_into_base(upto)

    def flatten(self) -> None:
        self.main.flatten()

    def export(self, name: str) -> None:
        self.main.export(self.root / name)

    def close(self) -> None:
        self.main.close()
        self.store.close()


def main(arguments: list[str]) -> None:
    root, wipe = Path(arguments[0]), arguments[2]
    seed: Seed = int(arguments[1]) if arguments[1].isdigit() else arguments[1]
    lower_limits()
    steps = plan(seed, wipe, int(arguments[3]) if len(arguments) > 3 else STEPS)
    workload = Workload(root, wipe, steps.base)
    for step in steps.steps:
        mark(root, f"begin {step.number}")
        operation: Callable[..., None] = getattr(workload, step.operation)
        try:
            operation(*step.arguments)
        except Exception as error:
            error.add_note(f"in {step} of seed {seed}, policy {wipe}")
            raise
        mark(root, f"done {step.number}")
    workload.close()


if __name__ == "__main__":
    main(sys.argv[1:])
