"""The cache of RAM files."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stand_in import LENGTH, StandIn, attach, make_machine

import onionskin
from onionskin.errors import StateError
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import capture, ram_files, restore
from onionskin.machine import ram as ram_module
from onionskin.machine.ram_files import RamFiles, Source
from onionskin.machine.running import Running, source_of

SECRET = 201


@pytest.fixture(params=["release", "zero"])
def wipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(tmp_path: Path, empty: Path, wipe: str) -> Iterator[Source]:
    """Where the RAM file of a snapshot is made from that has some data."""
    with onionskin.Store(tmp_path / "zero") as store:
        make_machine(store, wipe=wipe)
        process = StandIn(tmp_path / "run", empty)
        running = attach(store, process, tmp_path / "run")
        for page in range(3):
            process.write(page * 100, SECRET)
        capture.snapshot(running, "a")
        saved = restore.find_saved(store, running.machine, "a")
        running.close()
        RamFiles(store._opened).drop(saved.layer)
        process.close()
        yield source_of(store, saved.volume, saved.layer, LENGTH)


@pytest.fixture
def files(source: Source) -> RamFiles:
    with source.open() as volume:
        return RamFiles(volume._opened.store)


def directory(files: RamFiles) -> Path:
    return files._directory


def test_a_file_is_sparse_and_its_owners_alone_and_made_once(files: RamFiles, source: Source) -> None:
    with files.use(source) as one, files.use(source) as other:
        assert one.path == other.path and list(directory(files).iterdir()) == [one.path]
        status = one.path.stat()
        assert status.st_size == LENGTH and status.st_mode & 0o777 == 0o600
        assert status.st_blocks * 512 <= 4 * PAGE_BYTES
        with source.open() as volume:
            assert one.path.read_bytes() == volume.read(0, LENGTH)


def test_a_file_in_use_is_not_dropped(files: RamFiles, source: Source) -> None:
    with files.use(source) as used:
        assert not files.drop(source.layer)
        assert used.path.exists()
    assert files.drop(source.layer)
    assert list(directory(files).iterdir()) == []


def test_a_hypervisor_holds_the_file_that_it_maps(files: RamFiles, source: Source, tmp_path: Path) -> None:
    with files.use(source) as used:
        process = StandIn(tmp_path / "maps", used.path)
    try:
        assert not files.drop(source.layer)
    finally:
        process.close()
    assert files.drop(source.layer)


def test_a_dropped_file_is_overwritten_under_policy_zero(files: RamFiles, source: Source, wipe: str) -> None:
    with files.use(source) as used:
        descriptor = os.open(used.path, os.O_RDONLY)
    try:
        real = os.ftruncate
        seen = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "ftruncate", lambda fd, size: (seen.append(os.pread(fd, LENGTH, 0)), real(fd, size))[1])
            assert files.drop(source.layer)
        assert (bytes([SECRET]) not in seen[-1]) == (wipe == "zero")
    finally:
        os.close(descriptor)


def test_a_file_that_has_another_name_too_is_not_written_to(files: RamFiles, source: Source, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"somebody's")
    with files.use(source) as used:
        path = used.path
    files.drop(source.layer)
    for place in (path.with_name(path.name + ".new"), path):  # that of the draft, and that of the file
        os.link(other, place)
        with files.use(source) as used, source.open() as volume:
            assert used.path.read_bytes() == volume.read(0, LENGTH)
        assert other.read_bytes() == b"somebody's" and other.stat().st_nlink == 1
        files.drop(source.layer)


def test_what_a_killed_maker_left_is_swept_and_made_anew(files: RamFiles, source: Source) -> None:
    with files.use(source) as used:
        path = used.path
    files.drop(source.layer)
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(b"half of a file")
    with files.use(source):
        assert [one.name for one in directory(files).iterdir()] == [path.name]
    draft.write_bytes(b"half of a file")
    files.sweep()
    assert [one.name for one in directory(files).iterdir()] == [path.name]


def test_a_draft_that_is_being_made_is_left_alone(files: RamFiles, source: Source) -> None:
    with files.use(source) as used:
        draft = used.path.with_name(used.path.name + ".new")
    with draft.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files.sweep()
        assert draft.exists()


def test_who_makes_or_drops_a_file_and_was_stopped_is_not_waited_for_without_end(
    files: RamFiles, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram_files, "STOPPED_SECONDS", 0.0)
    with files.use(source) as used:
        path = used.path
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="is being dropped by another process"):
            files.use(source)
    files.drop(source.layer)
    with path.with_name(f"{path.name}.new").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="is being made by another process"):
            files.use(source)
    files.use(source).close()


def test_a_file_of_another_boot_or_of_no_layer_is_not_used_and_swept(
    files: RamFiles, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ram_files, "_boot", lambda: "another0")
        files.use(source).close()
    orphan = directory(files) / f"{'0' * 32}.{ram_files._boot()}.release"
    orphan.write_bytes(b"x")
    with files.use(source) as used:
        files.sweep()
        assert list(directory(files).iterdir()) == [used.path]


def test_files_that_were_not_used_for_longest_go_first(
    store: onionskin.Store, running: Running, process: StandIn
) -> None:
    for number in range(4):
        process.write(number, 1)
        capture.snapshot(running, f"s{number}")
        running.files.finish()
    running.files.sweep(keep=2)
    left = {path.name[:32] for path in directory(running.files).iterdir()}
    layers = [restore.find_saved(store, running.machine, f"s{number}").layer.hex() for number in range(4)]
    assert left == set(layers[2:])


def test_a_build_that_fails_leaves_nothing(files: RamFiles, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(ram_module, "fill_file", fail)
        with pytest.raises(OSError, match="no room"):
            files.use(source)
    assert list(directory(files).iterdir()) == []
    files.use(source).close()


def test_of_snapshots_that_follow_each_other_only_the_last_one_gets_a_file(
    store: onionskin.Store, running: Running, process: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram_files, "QUIET_SECONDS", 3600)  # however long a busy host takes between two of them
    for number in range(3):
        process.write(number, 1)
        capture.snapshot(running, f"s{number}")
    running.files.finish()
    last = restore.find_saved(store, running.machine, "s2").layer.hex()
    assert [path.name[:32] for path in directory(running.files).iterdir()] == [last]


def test_a_file_that_was_cut_off_is_made_again(files: RamFiles, source: Source) -> None:
    with files.use(source) as found:
        whole = found.path.read_bytes()
    os.truncate(found.path, 4096)
    with files.use(source) as again:
        assert again.path.read_bytes() == whole


def alter(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"something else")


def test_a_file_that_somebody_wrote_to_is_made_again(files: RamFiles, source: Source) -> None:
    with files.use(source) as found:
        whole = found.path.read_bytes()
    alter(found.path)
    assert files.use_if_there(source) is None
    with files.use(source) as again:
        assert again.path.read_bytes() == whole


@pytest.mark.parametrize("what", ["a link", "being dropped"])
def test_a_machine_that_stands_still_does_without_a_file_that_cannot_be_used_now(
    files: RamFiles, source: Source, what: str
) -> None:
    with files.use(source) as found:
        path = found.path
    with path.open("rb") as held:
        if what == "a link":
            path.rename(path.with_name("elsewhere"))
            path.symlink_to("elsewhere")
        else:
            fcntl.flock(held, fcntl.LOCK_EX)
        assert files.use_if_there(source) is None


def test_a_file_in_use_that_somebody_wrote_to_is_given_to_nobody_else(files: RamFiles, source: Source) -> None:
    with files.use(source) as found:
        alter(found.path)
        with pytest.raises(StateError, match="was written to; remove it, and it is made again"):
            files.use(source)
        found.path.unlink()
        files.use(source).close()


def test_a_file_is_used_on_a_file_system_that_keeps_no_times(
    files: RamFiles, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "utime", lambda *given, **how: None)
    files.use(source).close()
    files.use(source).close()


def test_what_is_no_file_in_the_place_of_one_is_named(files: RamFiles, source: Source) -> None:
    with files.use(source) as found:
        path = found.path
    for make in (path.mkdir, lambda: path.symlink_to("/etc/passwd"), lambda: os.mkfifo(path)):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        with pytest.raises(StateError, match="remove it"):
            files.use(source)


def test_a_file_is_made_at_low_priority_and_waited_for_at_that_of_whoever_asks_for_it(
    files: RamFiles, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    waits = files._next

    def wait() -> Source | None:
        steps.append("waits")
        return waits()

    monkeypatch.setattr(files, "_next", wait)
    monkeypatch.setattr(os, "setpriority", lambda *_: steps.append("lowered"))
    files.make_soon(source)
    files.finish()
    assert steps == ["waits", "lowered", "waits"] and files.use_if_there(source) is not None
