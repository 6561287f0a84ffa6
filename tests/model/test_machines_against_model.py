"""Drives machines of a store and a plain model through every operation that needs no hypervisor, and compares all of them."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.examples import examples
from support.machines import make_machine, read_head, snapshot_live

import onionskin
from onionskin.errors import StateError
from onionskin.operations import machines

EXAMPLES = examples(12)
pytestmark = pytest.mark.timeout(300 + 20 * EXAMPLES, method="thread")

NAMES = st.sampled_from("abcde")
BYTES = st.integers(1, 255)
MACHINES_MAX = 4


@dataclass
class Taken:
    """A snapshot: its parent, and what disks and RAM (None: it was off) began with."""

    parent: str | None
    disks: dict[str, int]
    ram: int | None


@dataclass
class Model:
    """A machine: what its disks begin with, its snapshots in order, and what its next start goes on from.

    `origin` is the machine and the snapshot whose RAM a fork begins with, as long as it did not run.
    """

    disks: dict[str, int]
    snapshots: dict[str, Taken] = field(default_factory=dict)
    stands_on: str | None = None
    resumes: int | None = None
    origin: tuple[str, str] | None = None
    forked_from: str | None = None

    def above(self, name: str) -> list[str]:
        """Return a snapshot and those that were taken after it, in order."""
        found = {name}
        for one, taken in self.snapshots.items():
            if taken.parent in found:
                found.add(one)
        return [one for one in self.snapshots if one in found]


class MachinesMachine(RuleBasedStateMachine):
    """All machines are off between rules; a rule that needs one to run runs it for itself."""

    @initialize(wipe=st.sampled_from(["release", "zero"]))
    def make(self, wipe):
        self.root = Path(tempfile.mkdtemp(prefix="onionskin-machines-"))
        self.store = onionskin.Store(self.root / "store")
        for name in ("web", "data"):
            self.store.create(name, size="64K", wipe=wipe).close()
        make_machine(self.store, "lab", ["web", "data"])
        self.model = {"lab": Model({"web": 0, "data": 0})}

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model)))

    def volume(self, machine, disk):
        return disk if machine == "lab" else f"{machine}.{disk}"

    def awaited(self, machine, names):
        """Whether a fork that never ran begins with one of these."""
        return any(one.origin and one.origin[0] == machine and one.origin[1] in names for one in self.model.values())

    @rule(data=st.data(), disk=st.sampled_from(["web", "data"]), byte=BYTES)
    def write(self, data, disk, byte):
        name = self.pick(data)
        if self.model[name].resumes is None:
            with self.store.open(self.volume(name, disk)) as volume:
                volume.write(0, bytes([byte]))
            self.model[name].disks[disk] = byte

    @rule(data=st.data(), snapshot=NAMES, byte=BYTES)
    def run_and_snapshot(self, data, snapshot, byte):
        name = self.pick(data)
        model = self.model[name]
        if snapshot in model.snapshots:
            return
        written = {self.volume(name, "web"): bytes([byte]), f"{name}.ram": bytes([byte])}
        snapshot_live(self.store, name, snapshot, written)
        model.disks["web"], model.resumes, model.origin = byte, None, None
        model.snapshots[snapshot] = Taken(model.stands_on, dict(model.disks), byte)
        model.stands_on = snapshot

    @rule(data=st.data(), snapshot=NAMES)
    def snapshot_off(self, data, snapshot):
        name = self.pick(data)
        model = self.model[name]
        if snapshot in model.snapshots:
            return
        if model.resumes is not None:
            with pytest.raises(StateError):
                self.store._snapshot_machine_off(name, snapshot)
            return
        self.store._snapshot_machine_off(name, snapshot)
        model.snapshots[snapshot] = Taken(model.stands_on, dict(model.disks), None)
        model.stands_on = snapshot

    @rule(data=st.data())
    def revert(self, data):
        name = self.pick(data)
        model = self.model[name]
        if not model.snapshots:
            return
        snapshot = data.draw(st.sampled_from(sorted(model.snapshots)))
        self.store._revert_machine(name, snapshot)
        taken = model.snapshots[snapshot]
        model.disks, model.stands_on = dict(taken.disks), snapshot
        model.resumes, model.origin = taken.ram, None

    @rule(data=st.data())
    def merge(self, data):
        name = self.pick(data)
        model = self.model[name]
        if not model.snapshots:
            return
        names = data.draw(st.lists(st.sampled_from(sorted(model.snapshots)), min_size=1, unique=True))
        if self.awaited(name, names) or (model.resumes is not None and model.stands_on in names):
            with pytest.raises(StateError):
                self.store._merge_machine_snapshots(name, names)
            return
        self.store._merge_machine_snapshots(name, names)
        for one in names:
            gone = model.snapshots.pop(one)
            for other in model.snapshots.values():
                other.parent = gone.parent if other.parent == one else other.parent
            if model.stands_on == one:
                model.stands_on = gone.parent

    @rule(data=st.data(), recursive=st.booleans())
    def discard(self, data, recursive):
        name = self.pick(data)
        model = self.model[name]
        if not model.snapshots:
            return
        snapshot = data.draw(st.sampled_from(sorted(model.snapshots)))
        going = model.above(snapshot)
        layers_used = any(one.forked_from == name for one in self.model.values())
        try:
            self.store._discard_machine_snapshots(name, snapshot, recursive=recursive)
        except StateError:
            assert layers_used or (len(going) > 1 and not recursive)
            return
        assert recursive or going == [snapshot]
        assert not self.awaited(name, going)
        if model.stands_on in going:
            model.disks = dict(model.snapshots[snapshot].disks)
            model.stands_on, model.resumes = model.snapshots[snapshot].parent, None
        for one in going:
            del model.snapshots[one]

    @precondition(lambda self: len(self.model) < MACHINES_MAX)
    @rule(data=st.data())
    def fork(self, data):
        name = self.pick(data)
        model = self.model[name]
        if not model.snapshots:
            return
        snapshot = data.draw(st.sampled_from(sorted(model.snapshots)))
        (made,) = self.store.fork_machine(name, snapshot, pattern="fork-{n}")
        taken = model.snapshots[snapshot]
        origin = (name, snapshot) if taken.ram is not None else None
        self.model[made] = Model(dict(taken.disks), {}, None, taken.ram, origin, name)

    @rule(data=st.data(), recursive=st.booleans())
    def delete(self, data, recursive):
        name = self.pick(data)
        if name == "lab":
            return
        is_forked = any(one.forked_from == name for one in self.model.values())
        try:
            self.store.delete_machines(name, recursive=recursive)
        except StateError:
            assert is_forked or (self.model[name].snapshots and not recursive)
            return
        assert recursive or not self.model[name].snapshots
        del self.model[name]

    @rule()
    def reopen(self):
        self.store.close()
        self.store = onionskin.Store(self.root / "store", create=False)

    @invariant()
    def all_is_as_in_the_model(self):
        if not hasattr(self, "store"):
            return
        assert [one.name for one in self.store.machines()] == sorted(self.model)
        assert sorted(self.store) == ["data", "web"]
        for name, model in self.model.items():
            about = self.store.machine_info(name)
            assert about.stands_on == model.stands_on
            assert about.begins == ("boots" if model.resumes is None else "resumes")
            for disk, byte in model.disks.items():
                assert read_head(self.store, self.volume(name, disk), 1)[0] == byte, (name, disk)
            found = self.store.machine_snapshots(name)
            assert {one.name: one.parent for one in found} == {
                one: taken.parent for one, taken in model.snapshots.items()
            }
            self.compare_snapshots(name, model)
            self.compare_beginning(name, model)

    def compare_snapshots(self, name, model):
        for snapshot, taken in model.snapshots.items():
            volumes = {self.volume(name, disk): byte for disk, byte in taken.disks.items()}
            volumes |= {f"{name}.ram": taken.ram} if taken.ram is not None else {}
            for volume, byte in volumes.items():
                with self.store.open(volume, snapshot=snapshot) as view:
                    assert view.read(0, 1)[0] == byte, (volume, snapshot)

    def compare_beginning(self, name, model):
        beginning = machines.beginning(self.store._opened, name)
        if model.resumes is None:
            assert beginning.ram is None
            return
        machines.refuse_written(self.store._opened, beginning.machine)
        volume, snapshot = beginning.ram
        with self.store.open(volume, snapshot=snapshot, mode="r") as ram:
            assert ram.read(0, 1)[0] == model.resumes

    @invariant()
    def the_store_is_whole(self):
        if hasattr(self, "store"):
            self.store.finish_work()
            assert [one for one in self.store.check() if one.severity == "error"] == []


MachinesMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestMachinesAgainstModel = MachinesMachine.TestCase
