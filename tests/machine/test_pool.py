"""A pool of forks that are ready: fork takes from it, and nothing is left of it, however it ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.guests import SECONDS_MAX, Console, configuration, end_machines, has_ended, stop_process, until

import onionskin
from onionskin.catalog import VolumeRow
from onionskin.errors import MachineExistsError, MachineNotFoundError, StateError
from onionskin.machine import pool as pools
from onionskin.machine.machine import Machine
from onionskin.machine.pool import MachinePool
from onionskin.machine.record import Record
from onionskin.operations import forks, machine_forks, machine_removal, machine_tree

pytestmark = pytest.mark.slow  # each starts several processes


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have forks wait for the pool, however busy the host is: they would do without."""
    monkeypatch.setattr(pools, "TAKE_SECONDS", float(SECONDS_MAX))


@pytest.fixture
def store(vms: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(vms) as store:
        try:
            yield store
        finally:
            for info in store.machines():
                with suppress(MachineNotFoundError):  # it was left by a pool, whose machine was asked a moment ago
                    for one in store.open_machine(info.name).pools():
                        one.stop()
            end_machines(store)


@pytest.fixture
def lab(store: onionskin.Store, qemu: list[str]) -> Machine:
    """A machine that is off, and was taken as `ready` while it ran."""
    one = configuration(qemu)
    machine = store.create_machine(
        "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
    )
    machine.start()
    with Console(machine._directory / "console") as console:
        console.wait_ticks()
    machine.snapshot("ready")
    machine.stop(force=True)
    return machine


def record_of(machine: Machine) -> Record:
    found = Record.read(machine._directory)
    assert found is not None and found.hypervisor and found.server and found.supervisor
    return found


def waiting(store: onionskin.Store) -> list[Machine]:
    """The machines that wait in pools, ready or not; one that was dropped since it was listed is left out."""
    found = []
    for info in store.machines(labels={"pool": "lab@ready"}):
        with suppress(MachineNotFoundError):
            found.append(store.open_machine(info.name))
    return found


def check_ticks(machine: Machine) -> None:
    with Console(machine._directory / "console") as console:
        console.wait_ticks()


def test_a_fork_is_the_machine_that_waited_with_the_name_the_labels_and_the_end_that_were_asked_for(
    lab: Machine, store: onionskin.Store
) -> None:
    with lab.pool("ready", warm=1):
        (warm,) = waiting(store)
        process = record_of(warm).hypervisor
        (fork,) = lab.fork("ready", names=["task"], lifetime="1h", labels={"run": "1"})
        assert record_of(fork).hypervisor == process
        info = fork.info()
        assert (info.name, info.labels, info.begins) == ("task", {"run": "1"}, "boots")
        assert [disk.volume for disk in info.disks] == ["task.web", "task.data"]
        assert info.expires is not None
        assert (info.expires - info.created).total_seconds() == pytest.approx(3600, abs=1)
        with Console(fork._directory / "console") as console:
            console.wait_ticks()
            assert "wrong" not in console.text  # its disk agrees with its memory
    assert fork.state == "running"
    assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_forks_beyond_the_pool_are_started_and_the_pool_makes_others(lab: Machine, store: onionskin.Store) -> None:
    with lab.pool("ready", warm=1) as pool:
        ready = {one._id for one in waiting(store)}
        made = lab.fork("ready", count=2)
        assert [one.name for one in made] == ["lab-1", "lab-2"]
        assert {one._id for one in made} & ready == ready
        for one in made:
            check_ticks(one)
        pool.wait()
        assert pool.status()["ready"] == 1
        assert {one._id for one in waiting(store)} & ready == set()
        assert len({record_of(one).generation for one in (*made, *waiting(store))}) == 3


def test_a_fork_from_a_pool_is_cut_put_back_and_taken_over_as_any_machine(lab: Machine) -> None:
    with lab.pool("ready", warm=1):
        (fork,) = lab.fork("ready")
    fork.snapshot("own")
    before = record_of(fork)
    assert before.server is not None and before.supervisor is not None
    os.kill(before.server.pid, signal.SIGKILL)
    until(lambda: record_of(fork).server != before.server)
    check_ticks(fork)
    fork.revert("own")
    check_ticks(fork)
    os.kill(record_of(fork).supervisor.pid, signal.SIGKILL)  # type: ignore[union-attr]
    until(lambda: not before.supervisor.is_alive)  # type: ignore[union-attr]
    assert fork.state == "running"
    os.kill(record_of(fork).server.pid, signal.SIGKILL)  # type: ignore[union-attr]
    check_ticks(fork)


def test_nothing_is_left_of_a_pool_that_was_killed(lab: Machine, store: onionskin.Store) -> None:
    pool = lab.pool("ready", warm=2)
    records = [record_of(one) for one in waiting(store)]
    os.kill(pool.status()["pid"], signal.SIGKILL)
    until(lambda: not waiting(store))
    processes = [one for record in records for one in (record.hypervisor, record.server, record.supervisor)]
    until(lambda: not any(one.is_alive for one in processes if one))
    assert lab.pools() == []
    assert [one.name for one in lab.fork("ready")] == ["lab-1"]


def test_rows_of_a_pool_that_nobody_took_away_expire(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_forks, "WAITING_SECONDS", 0.001)
    (name,) = machine_forks.make_waiting(store._opened, lab._id, "lab", "ready", 1)
    until(lambda: name in store.expire())
    assert waiting(store) == []


def test_a_machine_that_is_killed_in_the_pool_is_followed_by_another(lab: Machine, store: onionskin.Store) -> None:
    with lab.pool("ready", warm=1) as pool:
        (one,) = waiting(store)
        record = record_of(one)
        os.kill(record.supervisor.pid, signal.SIGKILL)  # type: ignore[union-attr]
        until(lambda: not record.hypervisor.is_alive)  # type: ignore[union-attr]
        until(lambda: one.name not in {other.name for other in store.machines()})
        pool.wait()
        assert [other._id for other in waiting(store)] != [one._id]


def leave_in_pool(lab: Machine, store: onionskin.Store) -> tuple[Machine, Record]:
    """Kill the supervisor of a machine that waits in a pool, and the pool before it can clean up."""
    pid = lab.pool("ready", warm=1).status()["pid"]
    (one,) = waiting(store)
    record = record_of(one)
    stop_process(pid)
    for process in (record.supervisor.pid, pid):  # type: ignore[union-attr]
        os.kill(process, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive and has_ended(pid))  # type: ignore[union-attr]
    assert record.hypervisor.is_alive and record.server.is_alive  # type: ignore[union-attr]
    return one, record


def start_and_stop_pool(lab: Machine) -> None:
    lab.pool("ready", warm=1).stop()


@pytest.mark.parametrize(
    "verb",
    [
        start_and_stop_pool,
        Machine.pools,
        lambda lab: lab.merge("ready"),
        lambda lab: lab.discard("ready"),
        lambda lab: lab.delete(recursive=True),
        lambda lab: onion("machine", "delete", "--recursive", "--yes", f"{lab._store.path}/lab"),
        lambda lab: onion("machine", "discard", "--yes", f"{lab._store.path}/lab@ready"),
    ],
    ids=["pool", "pools", "merge", "discard", "delete", "the verb delete", "the verb discard"],
)
def test_what_a_killed_pool_and_a_killed_supervisor_left_is_ended_by_the_next_verb(
    lab: Machine, store: onionskin.Store, verb: Callable[[Machine], object]
) -> None:
    one, record = leave_in_pool(lab, store)
    verb(lab)
    assert not record.hypervisor.is_alive and not record.server.is_alive  # type: ignore[union-attr]
    assert one.name not in {info.name for info in store.machines()}
    assert not (store.path / "machines" / one._id.hex()).exists()
    assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_what_they_left_expires_with_its_processes(lab: Machine, store: onionskin.Store) -> None:
    one, record = leave_in_pool(lab, store)
    assert one.name not in store.expire() and record.hypervisor.is_alive  # type: ignore[union-attr]
    store._opened.change(lambda: store._opened.catalog.update(VolumeRow, one._row.ram, expires_ns=1))
    store.expire()
    assert waiting(store) == []
    assert not record.hypervisor.is_alive and not record.server.is_alive  # type: ignore[union-attr]


def test_a_machine_whose_pool_and_supervisor_were_killed_is_not_taken_over(
    lab: Machine, store: onionskin.Store
) -> None:
    one, record = leave_in_pool(lab, store)
    assert one.state == "off"
    assert not record.hypervisor.is_alive and not record.server.is_alive  # type: ignore[union-attr]


def test_a_fork_that_was_taken_runs_though_pool_and_supervisor_were_killed_before_it_was_told(
    lab: Machine, store: onionskin.Store
) -> None:
    wanted = forks.check_wanted("lab", "ready", ["task"], None, None, None, None, None, None)
    pid = lab.pool("ready", warm=1).status()["pid"]
    (one,) = waiting(store)
    supervisor = record_of(one).supervisor
    assert supervisor is not None
    with pools.taken(lab._directory, pools.ids_of(store, "lab", "ready")[1], 1) as taken:
        machine_forks.fork_machine(store._opened, wanted, taken)
        stop_process(pid)
        os.kill(supervisor.pid, signal.SIGKILL)
        until(lambda: not supervisor.is_alive)
        os.kill(pid, signal.SIGKILL)
        until(lambda: has_ended(pid))
    assert lab.pools() == []  # which ends what nobody took
    task = store.open_machine("task")
    assert task.state == "running"
    check_ticks(task)


def test_a_fork_that_dies_before_it_has_told_the_machine_leaves_one_that_runs(
    lab: Machine, store: onionskin.Store
) -> None:
    wanted = forks.check_wanted("lab", "ready", ["task"], None, None, None, None, None, None)
    with lab.pool("ready", warm=1):
        with pools.taken(lab._directory, pools.ids_of(store, "lab", "ready")[1], 1) as taken:
            machine_forks.fork_machine(store._opened, wanted, taken)
        until(lambda: store.open_machine("task").state == "running")
    check_ticks(store.open_machine("task"))


def test_what_no_fork_took_ends_and_the_pool_is_full_again(lab: Machine, store: onionskin.Store) -> None:
    store.create("lab-1.data", size="1M").close()
    with lab.pool("ready", warm=1) as pool:
        (before,) = [one._id for one in waiting(store)]
        with pytest.raises(onionskin.VolumeExistsError):
            lab.fork("ready")
        pool.wait()
        until(lambda: [one._id for one in waiting(store)] not in ([before], []))
        with pytest.raises(MachineExistsError):
            lab.fork("ready", names=["lab"])
    assert [info.name for info in store.machines()] == ["lab"]


def test_a_pool_that_does_not_answer_keeps_no_fork_from_starting(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lab.pool("ready", warm=1) as pool:
        pid = pool.status()["pid"]
        (warm,) = waiting(store)
        stop_process(pid)
        monkeypatch.setattr(pools, "TAKE_SECONDS", 0.2)
        try:
            (fork,) = lab.fork("ready")
            assert fork._id != warm._id
            check_ticks(fork)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_forks_of_which_a_machine_cannot_be_told_are_made_without_the_pool(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lab.pool("ready", warm=1):
        (warm,) = waiting(store)
        monkeypatch.setattr(Machine, "_adopt", lambda *_: False)
        (fork,) = lab.fork("ready", names=["task"])
        assert fork._id != warm._id
        check_ticks(fork)
    assert [info.name for info in store.machines()] == ["lab", "task"]


def test_a_snapshot_beneath_a_pool_stays_and_its_machines_only_wait(lab: Machine, store: onionskin.Store) -> None:
    with lab.pool("ready", warm=1):
        (warm,) = waiting(store)
        for change in (lambda: lab.discard("ready"), lambda: lab.merge("ready"), lambda: lab.delete(recursive=True)):
            with pytest.raises(StateError, match="pool --stop"):
                change()
        for use in (warm.resume, warm.pause, lambda: warm.snapshot("x"), lambda: warm.revert("x"), warm.tell):
            with pytest.raises(StateError, match="waits in a pool"):
                use()
        with pytest.raises(StateError, match="already"):
            lab.pool("ready", warm=1)
        assert warm.state == "paused"
    lab.discard("ready")


def test_a_snapshot_beneath_a_pool_that_has_no_fork_ready_just_now_stays(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lab.pool("ready", warm=1):
        monkeypatch.setattr(machine_tree, "refuse_awaited", lambda *_, **__: None)  # as if none was
        monkeypatch.setattr(machine_removal, "_refuse_forked", lambda *_: None)
        for change in (
            *(lambda: lab.discard("ready"), lambda: lab.merge("ready"), lambda: lab.delete(recursive=True)),
            lambda: store.delete_machines("lab", recursive=True),
        ):
            with pytest.raises(StateError, match="a pool makes forks of a snapshot that would go: lab@ready"):
                change()
        lab.snapshot("later")
        assert [one.kept_by for one in lab.prune(keep_last=1)] == [("awaited",), ("last",)]
    assert [one.kept_by for one in lab.prune(keep_last=1)] == [(), ("last",)]


def test_a_snapshot_beneath_a_pool_stays_where_what_it_was_taken_after_is_discarded(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.revert("ready")  # which starts it
    lab.snapshot("next")
    lab.stop(force=True)
    with lab.pool("next", warm=1):
        monkeypatch.setattr(machine_tree, "refuse_awaited", lambda *_, **__: None)  # as if none was ready
        with pytest.raises(StateError, match="a pool makes forks of a snapshot that would go: lab@next"):
            lab.discard("ready", recursive=True)
    assert [one.name for one in store.machine_snapshots("lab")] == ["ready", "next"]


def test_a_pool_of_what_cannot_run_here_does_not_start(lab: Machine, store: onionskin.Store) -> None:
    lab.snapshot("off")
    with pytest.raises(StateError, match="no RAM"):
        lab.pool("off")
    with pytest.raises(ValueError, match="1 to 64"):
        lab.pool("ready", warm=0)
    assert lab.pools() == []
    assert waiting(store) == []


def onion(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "onionskin", *words], capture_output=True, text=True)


def test_the_verb_starts_tells_and_ends_a_pool(lab: Machine, vms: Path) -> None:
    name = f"{vms}/lab@ready"
    assert "no pool" in onion("machine", "pool", name, "--status").stderr
    assert "1 of 1 forks ready" in onion("machine", "pool", name, "--warm", "1").stdout
    assert "1 of 1 forks ready" in onion("machine", "pool", name, "--status").stdout
    assert onion("machine", "pool", name, "--status", "--stop").returncode == 2
    assert "has ended" in onion("machine", "pool", name, "--stop").stdout
    assert lab.pools() == []


def test_a_service_manager_hears_when_a_pool_is_ready_and_ends_it(
    lab: Machine, store: onionskin.Store, vms: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(SECONDS_MAX)
        process = subprocess.Popen(
            [sys.executable, "-m", "onionskin", "machine", "pool", f"{vms}/lab@ready", "--warm", "1", "--foreground"],
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        assert b"READY=1" in told.recv(4096)
        (pool,) = lab.pools()
        assert isinstance(pool, MachinePool) and pool.status()["pid"] == process.pid
        process.terminate()
        assert process.wait(SECONDS_MAX) == 0
    assert waiting(store) == []
