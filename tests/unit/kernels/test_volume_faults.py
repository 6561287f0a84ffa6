"""Files that fail under an open volume: an error, nothing lost that was flushed, and the process alive."""

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        yield store


def only(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def test_a_segment_that_is_truncated_under_a_mapping_is_an_io_error(store: onionskin.Store) -> None:
    with store.create("web", size=64 * BLOCK) as web:
        web.write(0, b"x" * 32 * BLOCK)
        web.snapshot("a")
        with store.open("web", snapshot="a") as view:
            assert view.read(20 * BLOCK, 4) == b"xxxx"
            os.truncate(only(store._opened.layout.segments), BLOCK * 3)
            with pytest.raises(OSError) as caught:
                view.read(20 * BLOCK, 4)
            assert caught.value.errno == errno.EIO
            assert view.read(0, 4) == b"xxxx"


def test_a_base_that_is_truncated_under_a_mapping_is_an_io_error(store: onionskin.Store, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 64 * BLOCK)
    with store.create("web", base=base) as web:
        os.truncate(base, BLOCK)
        with pytest.raises(OSError) as caught:
            web.read_blocks([40])
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(base))
        assert web.read(0, 2) == b"bb"


def test_a_base_that_changed_is_refused_and_relocate_is_named(store: onionskin.Store, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 64 * BLOCK)
    store.create("web", base=base).close()
    os.utime(base, (1, 1))
    with pytest.raises(onionskin.ChainError, match="relocate"):
        store.open("web")
    store.relocate("web", base=base, trust=True)
    store.open("web").close()


def test_a_second_writer_is_told_who_holds_the_volume(store: onionskin.Store) -> None:
    with (
        store.create("web", size=BLOCK),
        pytest.raises(onionskin.StateError, match=str(os.getpid())),
        onionskin.Store(store.path) as other,
    ):
        other.open("web")


def test_a_damaged_map_header_is_a_format_error(store: onionskin.Store) -> None:
    with store.create("web", size=64 * BLOCK) as web:
        web.write(0, b"x" * BLOCK)
    path = only(store._opened.layout.layers)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(onionskin.FormatError, match="map"):
        store.open("web")


def test_a_missing_segment_of_a_sealed_layer_is_an_error_that_names_it(store: onionskin.Store) -> None:
    with store.create("web", size=64 * BLOCK) as web:
        web.write(0, b"x" * BLOCK)
        web.snapshot("a")
    segment = only(store._opened.layout.segments)
    segment.unlink()
    with pytest.raises(FileNotFoundError, match=segment.name):
        store.open("web")
    assert any(problem.severity == "error" for problem in store.check())


def test_a_write_past_the_file_size_limit_fails_and_what_was_flushed_stays(store: onionskin.Store) -> None:
    with store.create("web", size=1024 * BLOCK) as web:
        web.write(0, b"x" * 8 * BLOCK)
        web.flush()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(OSError) as caught:
                web.write(400 * BLOCK, b"y" * 600 * BLOCK)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert caught.value.errno == errno.EFBIG
        web.write(400 * BLOCK, b"y" * 600 * BLOCK)
        assert web.read(0, 8 * BLOCK) == b"x" * 8 * BLOCK
        assert web.read(999 * BLOCK, BLOCK) == b"y" * BLOCK


def test_a_full_disk_fails_writes_and_flush_and_loses_nothing(ext4_mount) -> None:
    root = ext4_mount(48 << 20)
    with onionskin.Store(root / "store") as store, store.create("web", size="1G") as web:
        web.write(0, b"kept" * 1024)
        web.snapshot("clean")
        with pytest.raises(OSError) as caught:
            for offset in range(1 << 20, 1 << 30, 1 << 20):
                web.write(offset, os.urandom(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert web.read(0, 4) == b"kept"
        web.revert("clean")
        store.finish_work()
        web.write(1 << 20, b"again" * 1000)
        web.flush()
        assert web.read(1 << 20, 5) == b"again"


def test_a_volume_used_in_the_child_of_a_fork_raises_and_the_parent_goes_on(store: onionskin.Store) -> None:
    with store.create("web", size=64 * BLOCK) as web:
        web.write(0, b"parent")
        child = os.fork()
        if child == 0:
            try:
                web.read(0, 1)
            except onionskin.StateError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        web.snapshot("a")
        with onionskin.Store(store.path) as other, pytest.raises(onionskin.StateError):
            other.open("web")
        assert web.read(0, 6) == b"parent"


def test_a_child_that_was_forked_while_a_thread_held_the_locks_raises_and_does_not_wait(store: onionskin.Store) -> None:
    with store.create("web", size=64 * BLOCK) as web:
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with web._opened.guard, store._opened.catalog._guard, web._opened.locks._guard:
                held.set()
                release.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of just this
            child = os.fork()
        if child == 0:
            signal.alarm(300)
            try:
                web.close()
                store.volumes()
            except onionskin.StateError:
                os._exit(0)
            os._exit(1)
        release.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_catalog_with_a_row_that_names_nothing_is_a_format_error(store: onionskin.Store) -> None:
    store.create("web", size=BLOCK).close()
    for damage in ("DELETE FROM segments WHERE role = 'spare'", "DELETE FROM layers"):
        store.close()
        connection = sqlite3.connect(store._opened.layout.catalog)
        connection.execute(damage)
        connection.commit()
        connection.close()
        with onionskin.Store(store.path) as again:
            with pytest.raises(onionskin.FormatError, match="from a copy"):
                again.open("web")
            assert again._opened.catalog.unsound_rows()


def descriptors_of(path: Path) -> list[str]:
    """The descriptors that this process has open on a file."""
    links = Path("/proc/self/fd").iterdir()
    return [link.name for link in links if link.exists() and link.samefile(path)]


def test_a_store_whose_lock_file_cannot_be_opened_leaves_nothing_open(store: onionskin.Store) -> None:
    store.close()
    store._opened.layout.lock.unlink()
    store._opened.layout.lock.mkdir()
    with pytest.raises(onionskin.FormatError) as kept:  # it keeps the frames, and so what they leave open
        onionskin.Store(store.path)
    assert kept.traceback
    assert descriptors_of(store._opened.layout.catalog) == []


def test_a_store_whose_opening_is_interrupted_leaves_nothing_open(store: onionskin.Store, monkeypatch) -> None:
    class Interrupted(sqlite3.Connection):
        def execute(self, *_: object) -> sqlite3.Cursor:
            raise KeyboardInterrupt

    store.close()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Interrupted))
    with pytest.raises(KeyboardInterrupt) as kept:
        onionskin.Store(store.path)
    assert kept.traceback
    assert descriptors_of(store._opened.layout.catalog) == []


def test_a_store_on_a_read_only_file_system_is_said_to_be_on_one(ext4_mount) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store:
        store.create("web", size=BLOCK).close()
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    with onionskin.Store(root / "store") as store:
        assert store.read_only
        for change in (lambda: store.open("web"), lambda: store.create("db", size=BLOCK)):
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EROFS


def test_a_volume_that_cannot_be_flushed_does_not_keep_the_others_open(store: onionskin.Store, monkeypatch) -> None:
    volumes = [store.create(name, size=BLOCK) for name in ("a", "b", "c")]
    monkeypatch.setattr(volumes[1]._opened, "_finish", lambda head: os.open("/nonexistent", os.O_RDONLY))
    with pytest.raises(FileNotFoundError):
        store.close()
    assert all(volume.closed and volume._path.closed for volume in volumes)


def test_a_closed_volume_raises(store: onionskin.Store) -> None:
    web = store.create("web", size=BLOCK)
    web.close()
    for call in (lambda: web.read(0, 1), lambda: web.write(0, b"x"), web.flush, lambda: web.snapshot("a")):
        with pytest.raises(onionskin.StateError, match="closed"):
            call()


def test_a_range_past_the_end_is_refused(store: onionskin.Store) -> None:
    with store.create("web", size=BLOCK) as web:
        for call in (lambda: web.read(0, BLOCK + 1), lambda: web.write(BLOCK, b"x"), lambda: web.trim(1, 1 << 62)):
            with pytest.raises(ValueError, match="end of the volume"):
                call()
