"""Who has no descriptor or no memory left to look with does not take that for: there is nothing."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onionskin
from onionskin.base import sockets
from onionskin.base.paths import FilePath
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import agent, orphans, pool, qemu, ram_files, record
from onionskin.machine.ram import ComparedRam
from onionskin.machine.record import ProcessId
from onionskin.operations import check
from onionskin.storage import locks
from onionskin.storage.chain import lead_to_same_bytes


def failing(number: int) -> Callable[..., Any]:
    def fail(*given: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number), str(given[0]))

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_process_that_runs_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    own = ProcessId.of(os.getpid())
    assert own.is_alive
    monkeypatch.setattr(locks, "open", failing(number), raising=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        _ = own.is_alive


def test_a_process_that_has_begun_to_end_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ProcessId.of(os.getpid())
    monkeypatch.setattr(record.Path, "read_text", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        _ = own.is_alive


def test_a_process_that_listens_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "connect_unix", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        orphans.processes([tmp_path])


def test_a_record_that_cannot_be_read_now_is_not_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "read_json", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        record.Record.read(tmp_path)


def test_data_that_cannot_be_looked_for_is_not_reported_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.os, "open", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        check._data_from(FilePath(tmp_path / "file"), 0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_segment_is_said_to_be_damaged_where_it_cannot_be_read_and_not_where_nothing_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(check.os, "open", failing(number))
    path = FilePath(tmp_path / "segment")
    if number == errno.EIO:
        assert os.strerror(number) in str(check._segment_fault(path, bytes(16), 4096, 1))
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        check._segment_fault(path, bytes(16), 4096, 1)


def test_a_lock_file_of_many_volumes_is_no_stranger_where_it_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.os, "open", failing(errno.ENFILE))
    with pytest.raises(OSError, match=os.strerror(errno.ENFILE)):
        locks.stands_for_many(FilePath(tmp_path / "lock"))


def test_a_base_that_cannot_be_looked_at_may_be_the_one_that_is_merged_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "other"):
        (tmp_path / name).write_bytes(bytes(8192))
    with onionskin.Store(tmp_path / "store") as store:
        store.create("beside", base=tmp_path / "other").close()
        with store.create("web", base=tmp_path / "base") as web:
            web.write(0, b"web")
            stat = os.stat

            def refused(path: Any, **named: Any) -> os.stat_result:
                return failing(errno.EACCES)(path) if str(path) == str(tmp_path / "other") else stat(path, **named)

            with monkeypatch.context() as patch, pytest.raises(PermissionError):
                patch.setattr(os, "stat", refused)
                web.merge_into_base()
            web.merge_into_base()
            assert (tmp_path / "base").read_bytes()[:3] == b"web"


def test_a_file_that_is_gone_is_no_other_one(tmp_path: Path) -> None:
    gone, there = FilePath(tmp_path / "gone"), FilePath(tmp_path / "there")
    Path(there).touch()
    assert not lead_to_same_bytes(gone, there)
    assert lead_to_same_bytes(gone, gone)


SHORTAGES = pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])


@SHORTAGES
def test_a_pool_that_cannot_be_asked_is_not_said_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(sockets, "connect_unix", failing(number))
    one = pool.MachinePool(tmp_path, "clean", bytes(16))
    for ask in (lambda: one.is_there, one.stop):
        with pytest.raises(OSError, match=os.strerror(number)):
            ask()
    with pool.taken(tmp_path, bytes(16), 1) as taken:  # a fork does without it
        assert taken == []


@SHORTAGES
def test_a_guest_that_cannot_be_asked_is_not_said_to_have_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(sockets, "connect_unix", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        agent.GuestAgent(tmp_path / "agent", "lab")


def test_how_a_machine_ended_that_cannot_be_read_now_is_not_said_to_be_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1M").close()
        machine = store.create_machine("lab", disks=["web"], memory="1M")
        monkeypatch.setattr(record, "read_json", failing(errno.EMFILE))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            machine._ended()


def test_a_ram_file_that_cannot_be_looked_at_is_not_one_that_nobody_wrote_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{bytes(16).hex()}.{ram_files._boot()}.release"
    assert not ram_files.was_written_to(path)
    monkeypatch.setattr(ram_files.Path, "stat", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        ram_files.was_written_to(path)


@pytest.fixture
def no_look_for_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Have the look for data in a file fail from now on."""
    seek = os.lseek

    def fail(number: int) -> None:
        def without_data(descriptor: int, at: int, whence: int) -> int:
            return failing(number)(descriptor) if whence == os.SEEK_DATA else seek(descriptor, at, whence)

        monkeypatch.setattr(os, "lseek", without_data)

    yield fail


def test_ram_that_cannot_be_looked_for_is_not_taken_for_zeros(
    tmp_path: Path, no_look_for_data: Callable[[int], None]
) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"guest".ljust(PAGE_BYTES, b"\0"))
    ram = ComparedRam(path, SimpleNamespace())  # type: ignore[arg-type]
    assert ram._held().tolist() == [True]
    no_look_for_data(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        ram._held()
    ram.close()


def test_a_ram_file_of_which_nobody_knows_where_its_data_is_is_overwritten_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_look_for_data: Callable[[int], None]
) -> None:
    wiped: list[tuple[int, int]] = []

    def wipe(descriptor: int, ranges: list[tuple[int, int]], **how: bool) -> Any:
        wiped.extend(ranges)
        return SimpleNamespace(bytes_unwipeable=0)

    with onionskin.Store(tmp_path / "vms") as store:
        path = tmp_path / "ram"
        path.write_bytes(bytes(3 * PAGE_BYTES))
        monkeypatch.setattr(ram_files, "wipe", wipe)
        no_look_for_data(errno.EINVAL)
        with path.open("r+b") as file:
            ram_files.RamFiles(store._opened)._empty(file.fileno(), is_wiped=True)
    assert wiped == [(0, 3 * PAGE_BYTES)]
    assert not path.stat().st_size


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN])
def test_a_hypervisor_that_cannot_be_started_now_is_not_said_to_be_none(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(qemu.subprocess, "Popen", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        qemu._probe("/usr/bin/qemu", 0)


def test_a_machine_whose_writes_cannot_be_noted_for_want_of_memory_is_not_one_that_cannot_note_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[float] = []
    process = SimpleNamespace(meet_library=lambda: failing(errno.ENOMEM)("pages"), quit=ended.append)
    monkeypatch.setattr(qemu, "library", lambda: tmp_path)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        qemu._start_tracked(lambda *_, **__: process, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert ended == [0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_export_goes_over_no_file_that_may_be_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    base, link = tmp_path / "base", tmp_path / "link"
    base.write_bytes(b"base".ljust(4096, b"\0"))
    link.hardlink_to(base)
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", base=base).close()
        store.create("other", size="1M").close()
        stat = os.stat

        def refused(path: Any, **named: Any) -> os.stat_result:
            return failing(number)(path) if str(path) == str(base) else stat(path, **named)

        with store.open("other") as other, monkeypatch.context() as patch:
            patch.setattr(os, "stat", refused)
            with pytest.raises(OSError, match=os.strerror(number)):
                other.export(link)
    assert link.read_bytes()[:4] == b"base"


@SHORTAGES
def test_a_directory_that_cannot_be_opened_now_is_not_said_to_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(number))
        with pytest.raises(OSError, match=os.strerror(number)), locks.locked_directory(FilePath(tmp_path), alone=True):
            pytest.fail("somebody may have it")
    with locks.locked_directory(FilePath(tmp_path / "none"), alone=True) as is_locked:
        assert is_locked  # there is none, so nobody has it


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EOPNOTSUPP])
def test_a_directory_counts_as_locked_only_where_its_file_system_locks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    if number == errno.EOPNOTSUPP:
        with locks.locked_directory(FilePath(tmp_path), alone=True) as is_locked:
            assert is_locked
        return
    with pytest.raises(OSError, match=os.strerror(number)), locks.locked_directory(FilePath(tmp_path), alone=True):
        pytest.fail("somebody may have it")
