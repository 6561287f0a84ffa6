"""Ten thousand operations over a tree of two hundred snapshots, reopened five hundred times: equal at every step."""

import os
import random
from pathlib import Path

import pytest
from model.disk_model import StoreModel, VolumeModel

import onionskin

BLOCK = 4096
BLOCKS = 64
# Fewer for an engine that was built with sanitizers (tools/sanitized_tests.sh).
OPERATIONS = int(os.environ.get("ONIONSKIN_OPERATIONS", "10000"))
REOPENINGS = OPERATIONS // 20
SNAPSHOTS = OPERATIONS // 50


class SevenDays:
    """A store and its model, driven by a seed."""

    def __init__(self, root: Path, seed: int, wipe: str) -> None:
        self.random = random.Random(seed)
        self.path = root / "store"
        base = self.random.randbytes(BLOCKS * BLOCK // 2)
        (root / "base.raw").write_bytes(base)
        self.store = onionskin.Store(self.path)
        self.volume = self.store.create("web", base=root / "base.raw", size=BLOCKS * BLOCK, wipe=wipe)
        self.model = StoreModel({"web": VolumeModel("web", bytearray(base.ljust(BLOCKS * BLOCK, b"\0")))})
        self.snapshots_made = 0

    def names(self) -> list[str]:
        return sorted(self.model.of("web"))

    def write(self) -> None:
        offset = self.random.randrange(BLOCKS * BLOCK)
        data = self.random.randbytes(min(self.random.choice([1, 512, BLOCK, 5 * BLOCK]), BLOCKS * BLOCK - offset))
        self.volume.write(offset, data)
        self.model.write("web", offset, data)

    def trim(self) -> None:
        offset = self.random.randrange(BLOCKS * BLOCK)
        length = min(self.random.choice([100, BLOCK, 9 * BLOCK]), BLOCKS * BLOCK - offset)
        self.volume.trim(offset, length)
        self.model.write("web", offset, bytes(length))

    def snapshot(self) -> None:
        if len(self.names()) >= SNAPSHOTS:
            return self.merge()
        self.snapshots_made += 1
        self.volume.snapshot(f"s{self.snapshots_made}")
        self.model.snapshot("web", f"s{self.snapshots_made}")

    def revert(self) -> None:
        if names := self.names():
            name = self.random.choice(names)
            self.volume.revert(name)
            self.model.revert("web", name)

    def merge(self) -> None:
        if names := self.names():
            name = self.random.choice(names)
            self.volume.merge(name)
            self.model.merge("web", name)

    def discard(self) -> None:
        names = self.names()
        self.random.shuffle(names)
        for name in names:  # to the first leaf: to ask of all two hundred takes an eighth of the test
            if self.model.may_discard("web", name, False):
                self.volume.discard(name)
                self.model.discard("web", name)
                return

    def flush(self) -> None:
        self.volume.flush()

    def reopen(self) -> None:
        self.store.close()
        self.store = onionskin.Store(self.path, create=False)
        self.volume = self.store.open("web")

    def compare(self) -> None:
        assert self.volume.read(0, BLOCKS * BLOCK) == self.model.volumes["web"].disk
        assert sorted(snapshot.name for snapshot in self.volume.snapshots) == self.names()
        if names := self.names():
            name = self.random.choice(names)
            with self.store.open("web", snapshot=name) as view:
                assert view.read(0, BLOCKS * BLOCK) == self.model.of("web")[name].disk


@pytest.mark.slow
@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_a_week_in_small_equals_the_model_at_every_step(tmp_path: Path, wipe: str) -> None:
    week = SevenDays(tmp_path, 7, wipe)
    operations = [week.write, week.trim, week.snapshot, week.revert, week.merge, week.discard, week.flush]
    most = 0
    for step in range(OPERATIONS):
        if step % (OPERATIONS // REOPENINGS) == 0:
            week.reopen()
        # More snapshots are taken than go, until there are two hundred.
        week.random.choices(operations, weights=[40, 10, 12, 4, 3, 2, 5])[0]()
        week.compare()
        most = max(most, len(week.names()))
    assert most == SNAPSHOTS
    assert [problem for problem in week.store.check() if problem.severity == "error"] == []
    week.store.close()
