"""Drives a store and a plain model through every operation, and compares all that can be read."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model.disk_model import StoreModel, VolumeModel
from support.examples import examples

import onionskin

# Hypothesis takes the exception of pytest-timeout's signal for one of the example, and goes on: so end the process.
EXAMPLES = examples(30)
pytestmark = pytest.mark.timeout(300 + 10 * EXAMPLES, method="thread")

BLOCK = 4096
BASE_BYTES = 40 * BLOCK + 1000
NAMES = st.sampled_from([f"s{i}" for i in range(8)])
VOLUMES = st.sampled_from(["web", "db", "clone-1", "clone-2"])
PLACES = st.tuples(st.integers(0, 60 * BLOCK), st.integers(0, 9 * BLOCK))


class StoreMachine(RuleBasedStateMachine):
    """Volumes stay open until a rule closes them; each may be open or closed."""

    @initialize(wipe=st.sampled_from(["release", "zero"]), seed=st.integers(0, 2**32))
    def make(self, wipe, seed):
        self.random = random.Random(seed)
        self.root = Path(tempfile.mkdtemp(prefix="onionskin-model-"))
        base = self.random.randbytes(BASE_BYTES)
        (self.root / "base.raw").write_bytes(base)
        self.model = StoreModel()
        self.store = onionskin.Store(self.root / "store")
        self.open = {
            "web": self.store.create("web", base=self.root / "base.raw", wipe=wipe),
            "db": self.store.create("db", size=50 * BLOCK, wipe=wipe),
        }
        self.model.volumes["web"] = VolumeModel("web", bytearray(base))
        self.model.volumes["db"] = VolumeModel("db", bytearray(50 * BLOCK))

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)

    def _volume(self, name):
        if name not in self.model.volumes:
            return None
        if name not in self.open:
            self.open[name] = self.store.open(name)
        return self.open[name]

    def _range(self, name, place):
        size = len(self.model.volumes[name].disk)
        offset = min(place[0], size)
        return offset, min(place[1], size - offset)

    @rule(name=VOLUMES, place=PLACES)
    def write(self, name, place):
        if volume := self._volume(name):
            offset, length = self._range(name, place)
            data = self.random.randbytes(length)
            assert volume.write(offset, data) == length
            self.model.write(name, offset, data)

    @rule(name=VOLUMES, blocks=st.lists(st.integers(0, 100), max_size=20))
    def write_blocks(self, name, blocks):
        if volume := self._volume(name):
            whole = len(self.model.volumes[name].disk) // BLOCK
            blocks = [block % whole for block in blocks] if whole else []
            data = self.random.randbytes(len(blocks) * BLOCK)
            volume.write_blocks(blocks, data)
            for i, block in enumerate(blocks):
                self.model.write(name, block * BLOCK, data[i * BLOCK : (i + 1) * BLOCK])

    @rule(name=VOLUMES, place=PLACES, trim=st.booleans())
    def zero(self, name, place, trim):
        if volume := self._volume(name):
            offset, length = self._range(name, place)
            (volume.trim if trim else volume.zero)(offset, length)
            self.model.write(name, offset, bytes(length))

    @rule(name=VOLUMES)
    def flush(self, name):
        if volume := self._volume(name):
            volume.flush()

    @rule(name=VOLUMES, size=st.integers(1, 60 * BLOCK))
    def resize(self, name, size):
        if volume := self._volume(name):
            volume.resize(size, force=True)
            self.model.resize(name, size)

    @rule(name=VOLUMES, snapshot=NAMES)
    def snapshot(self, name, snapshot):
        if volume := self._volume(name):
            if snapshot in self.model.of(name):
                with pytest.raises(onionskin.SnapshotExistsError):
                    volume.snapshot(snapshot)
            else:
                volume.snapshot(snapshot)
                self.model.snapshot(name, snapshot)

    @rule(name=VOLUMES, snapshot=NAMES)
    def revert(self, name, snapshot):
        if (volume := self._volume(name)) and snapshot in self.model.of(name):
            volume.revert(snapshot)
            self.model.revert(name, snapshot)

    @rule(name=VOLUMES, snapshot=NAMES, recursive=st.booleans())
    def discard(self, name, snapshot, recursive):
        if (volume := self._volume(name)) and snapshot in self.model.of(name):
            if self.model.may_discard(name, snapshot, recursive):
                volume.discard(snapshot, recursive=recursive)
                self.model.discard(name, snapshot)
            else:
                with pytest.raises(onionskin.StateError):
                    volume.discard(snapshot, recursive=recursive)

    @rule(name=VOLUMES, snapshot=NAMES)
    def merge(self, name, snapshot):
        if (volume := self._volume(name)) and snapshot in self.model.of(name):
            volume.merge(snapshot)
            self.model.merge(name, snapshot)

    @rule(name=VOLUMES, snapshot=NAMES, new=st.sampled_from(["clone-1", "clone-2"]))
    def clone(self, name, snapshot, new):
        if snapshot in self.model.of(name) and new not in self.model.volumes:
            self.store.clone(name, snapshot, new)
            self.model.clone(name, snapshot, new)

    @rule(name=st.sampled_from(["clone-1", "clone-2"]), recursive=st.booleans())
    def delete(self, name, recursive):
        if name in self.model.volumes:
            if name in self.open:
                self.open.pop(name).close()
            if self.model.may_delete(name, recursive):
                self.store.delete(name, recursive=recursive)
                self.model.delete(name)
            else:
                with pytest.raises(onionskin.StateError):
                    self.store.delete(name, recursive=recursive)

    @rule(name=VOLUMES)
    def flatten(self, name):
        if volume := self._volume(name):
            volume.flatten()
            self.model.flatten(name)

    @rule(name=VOLUMES)
    def close(self, name):
        if name in self.open:
            self.open.pop(name).close()

    @rule()
    def reopen_the_store(self):
        self.store.close()
        self.open = {}
        self.store = onionskin.Store(self.root / "store", create=False)

    @rule(name=VOLUMES, snapshot=NAMES)
    def view(self, name, snapshot):
        if snapshot in self.model.of(name):
            disk = self.model.of(name)[snapshot].disk
            with self.store.open(name, snapshot=snapshot) as view:
                array = view.view(0, len(disk))
                assert view.read(0, len(disk)) == disk
            assert array.tobytes() == disk

    @rule()
    def check_finds_nothing(self):
        for volume in self.open.values():
            volume.flush()
        assert [problem for problem in self.store.check() if problem.severity == "error"] == []

    @invariant()
    def everything_reads_as_in_the_model(self):
        if not hasattr(self, "model"):
            return
        for name, volume in self.open.items():
            disk = self.model.volumes[name].disk
            assert volume.size_bytes == len(disk)
            assert volume.read(0, len(disk)) == disk
        names = {
            (info.name, snapshot.name) for info in self.store.volumes() for snapshot in self.store.snapshots(info.name)
        }
        assert names == {(snapshot.volume, snapshot.name) for snapshot in self.model.snapshots}


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
