"""Shows that the crash harness finds what it is for: programs with the right barriers have no violation in
any state, and each barrier taken away is found. Also tests of the model's parts by themselves.

The programs call os.* rather than pathlib: each line is one system call that the recorder should see.
"""

# ruff: noqa: PTH102, PTH103, PTH104, PTH106, PTH108

import json
import os
import sqlite3
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from crash.harness.replay import (
    ALL,
    KEEP_SIZE,
    MARK,
    PUNCH_HOLE,
    RECORD,
    RECORD_MAGIC,
    FileChange,
    Image,
    LogError,
    Selection,
    State,
    freed_unwiped,
    parse_log,
    settle_file,
)
from crash.harness.run import Recording, check_states, choose_states, resume, run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


# ---- programs under test ----


def journal_program(root: Path, *, sync_data: bool = True, sync_directory: bool = True) -> None:
    """Appends checksummed records to a journal, as a map log does."""
    import os
    import zlib

    from crash.harness.run import mark

    journal = os.open(root / "journal", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    if sync_directory:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
    offset = 0
    for number in range(6):
        body = number.to_bytes(4, "little") + bytes([number + 1]) * 1500
        record = zlib.crc32(body).to_bytes(4, "little") + body
        os.pwrite(journal, record, offset)
        offset += len(record)
        if sync_data:
            os.fdatasync(journal)
        mark(root, f"appended {number}")


def check_journal(directory: Path, markers: Sequence[str]) -> list[str]:
    import zlib

    path = directory / "journal"
    contents = path.read_bytes() if path.exists() else b""
    count = 0
    for offset in range(0, len(contents), 1508):
        record = contents[offset : offset + 1508]
        body = record[4:]
        if len(record) < 1508 or zlib.crc32(body) != int.from_bytes(record[:4], "little"):
            break
        if int.from_bytes(body[:4], "little") != count:
            return [f"record {count} is another one"]
        count += 1
    return [] if count >= len(markers) else [f"{len(markers)} records were appended, {count} are there"]


def rename_program(root: Path, *, sync_file: bool = True, sync_directory: bool = True) -> None:
    """Replaces a file by renaming a new one over it."""
    import os

    from crash.harness.run import mark

    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(5):
        new = os.open(root / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(new, b"%04d" % number * 300)
        if sync_file:
            os.fsync(new)
        os.close(new)
        os.rename(root / "new", root / "settings")
        if sync_directory:
            os.fsync(directory)
        mark(root, str(number))


def check_renamed(directory: Path, markers: Sequence[str]) -> list[str]:
    path = directory / "settings"
    if not path.exists():
        return ["the file is gone"] if markers else []
    contents = path.read_bytes()
    least = int(markers[-1]) if markers else 0
    return [] if contents in [b"%04d" % number * 300 for number in range(least, 5)] else [f"holds {contents[:8]!r}"]


def database_program(root: Path, *, synchronous: str = "FULL") -> None:
    """Commits rows to SQLite in WAL mode, with checkpoints in between."""
    import sqlite3

    from crash.harness.run import mark

    database = sqlite3.connect(root / "catalog.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA synchronous={synchronous}")
    database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, body BLOB)")
    mark(root, "table")
    for number in range(8):
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO rows VALUES (?, ?)", (number, bytes([number]) * 3000))
        database.execute("UPDATE rows SET body = ? WHERE number = 0", (bytes([number]) * 3000,))
        database.execute("COMMIT")
        mark(root, str(number))
        if number == 4:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def check_database(directory: Path, markers: Sequence[str]) -> list[str]:
    if not markers:
        return []  # nothing was acknowledged; the table may not be there yet
    with closing(sqlite3.connect(directory / "catalog.db")) as database:
        if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            return ["integrity_check fails"]
        rows = database.execute("SELECT number, body FROM rows ORDER BY number").fetchall()
    committed = len(markers) - 1
    if len(rows) < committed or [row[0] for row in rows] != list(range(len(rows))):
        return [f"{committed} rows were committed, {len(rows)} are there"]
    torn = rows and (rows[0][1] != bytes([len(rows) - 1]) * 3000)
    return ["a transaction is there in part"] if torn else []


def without(program: Callable[..., None], **removed: object) -> Callable[[Path], list[str]]:
    """A command that runs a program with barriers removed."""
    module, name = program.__module__, program.__name__

    def command(root: Path) -> list[str]:
        import sys

        text = (
            f"import importlib.util, pathlib\n"
            f"spec = importlib.util.spec_from_file_location({module!r}, {__file__!r})\n"
            f"module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
            f"module.{name}(pathlib.Path({str(root)!r}), **{removed!r})\n"
        )
        return [sys.executable, "-c", text]

    return command


@pytest.mark.parametrize(
    ("program", "checker"),
    [(journal_program, check_journal), (rename_program, check_renamed), (database_program, check_database)],
)
@pytest.mark.slow
def test_correct_barriers_survive_every_crash(
    root: Path, program: Callable[..., None], checker: Callable[[Path, Sequence[str]], list[str]]
) -> None:
    recording = run(program, root)
    report = check_states(recording, checker)
    assert report.tried > 30
    assert recording.barriers > 5
    assert not report.violations, report


@pytest.mark.parametrize(
    ("program", "removed", "checker"),
    [
        (journal_program, {"sync_data": False}, check_journal),
        (journal_program, {"sync_directory": False}, check_journal),
        (rename_program, {"sync_file": False}, check_renamed),
        (rename_program, {"sync_directory": False}, check_renamed),
        (database_program, {"synchronous": "OFF"}, check_database),
        (database_program, {"synchronous": "NORMAL"}, check_database),
    ],
)
def test_a_removed_barrier_is_found(
    root: Path,
    program: Callable[..., None],
    removed: dict[str, object],
    checker: Callable[[Path, Sequence[str]], list[str]],
) -> None:
    recording = run(without(program, **removed)(root), root)
    assert check_states(recording, checker, violations_max=1).violations


# ---- the recorder ----


def calls_program(root: Path) -> None:
    """Makes each kind of call once; what it leaves is compared with what replay says it leaves."""
    import os
    import shutil
    import threading

    os.makedirs(root / "a" / "b")
    first = os.open(root / "a" / "first", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(first, b"one" * 1000)
    os.write(first, b"two" * 1000)
    os.pwritev(first, [b"three", b"four" * 100], 4096)
    os.writev(first, [b"five", b"", b"six"])
    os.ftruncate(first, 9000)
    os.posix_fallocate(first, 0, 16384)
    os.truncate(root / "a" / "first", 15000)
    os.copy_file_range(first, first, 500, 0, 10000)
    added = os.open(root / "added", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(added, b"x" * 10)
    os.pwrite(added, b"y" * 10, 0)
    with open(root / "through a file object", "wb") as file:
        file.write(b"z" * 5000)
    os.link(root / "added", root / "linked")
    os.rename(root / "through a file object", root / "a" / "b" / "moved")
    shutil.copyfile(root / "a" / "first", root / "copied")
    os.unlink(root / "added")
    os.mkdir(root / "gone")
    os.rmdir(root / "gone")
    os.rename(root / "a" / "b", root / "c")
    with open(root / "before", "r+b") as again:
        again.truncate()
        again.seek(3)
        again.write(b"!")
    shared = os.open(root / "shared", os.O_RDWR | os.O_CREAT, 0o644)

    def write_many(byte: int) -> None:
        for number in range(200):
            os.pwrite(shared, bytes([byte]) * 700, (number * 37) % 3000)

    threads = [threading.Thread(target=write_many, args=(byte,)) for byte in (1, 2, 3)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if child == 0:
        write_many(4)
        os._exit(0)
    for thread in threads:
        thread.join()
    os.waitpid(child, 0)


def contents_below(root: Path) -> dict[str, bytes | None]:
    paths = [path for path in root.rglob("*") if path.name != ".crash-mark"]
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in paths}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_replay_of_every_call_ends_with_the_files_that_are_there(root: Path) -> None:
    (root / "before").write_bytes(b"was here before")
    recording = run(calls_program, root)
    after = contents_below(root)
    last = list(recording.replay().states([recording.replay().plans(["prefix"])[-1]]))[-1]
    found = {path: file.image.contents() for path, file in last.files.items()}
    assert {**found, **dict.fromkeys(last.directories)} == after


def test_markers_carry_their_text_and_leave_no_file(root: Path) -> None:
    def program(root: Path) -> None:
        from crash.harness.run import mark

        mark(root, "begun")
        (root / "file").write_bytes(b"1")
        mark(root, "done")

    states = list(choose_states(run(program, root), ["prefix"]))
    assert [[marker.text for marker in state.markers] for state in states][-1] == ["begun", "done"]
    assert all(".crash-mark" not in state.files for state in states)


def test_a_killed_program_is_recorded_up_to_its_end(root: Path) -> None:
    def program(root: Path) -> None:
        import os
        import signal

        (root / "file").write_bytes(b"1")
        os.kill(os.getpid(), signal.SIGKILL)

    recording = run(program, root, expect_success=False)
    last = list(choose_states(recording, ["prefix"]))[-1]
    assert last.files["file"].image.contents() == b"1"


def test_a_writable_shared_mapping_is_refused(root: Path) -> None:
    def program(root: Path) -> None:
        import mmap

        (root / "file").write_bytes(bytes(4096))
        with open(root / "file", "r+b") as file:
            mmap.mmap(file.fileno(), 4096)[0:1] = b"1"

    with pytest.raises(LogError, match="mapped shared and writable"):
        list(choose_states(run(program, root)))


def test_failing_calls_are_not_recorded(root: Path) -> None:
    def program(root: Path) -> None:
        import contextlib
        import os

        def rename(path: Path) -> None:
            os.rename(path, root / "b")

        def truncate(path: Path) -> None:
            os.truncate(path, 1)

        for call in (os.unlink, os.rmdir, rename, truncate):
            with contextlib.suppress(OSError):
                call(root / "absent")

    assert run(program, root).entries == []


# ---- the log ----


def encode_record(kind: int, data: bytes = b"", path: bytes = b"") -> bytes:
    return RECORD.pack(RECORD_MAGIC, kind, 5, 1, 0, 0, 0, 0, len(data), 0, len(path), 0, 7) + path + data


def test_a_log_cut_at_any_byte_gives_its_whole_records() -> None:
    records = [
        encode_record(1, path=b"file"),
        encode_record(3, b"bytes", b"file"),
        encode_record(10, b"marker"),
    ]
    log = b"".join(records)
    ends = [sum(map(len, records[:count])) for count in range(4)]
    for cut in range(len(log) + 1):
        entries, truncated = parse_log(log[:cut])
        assert len(entries) == sum(end <= cut for end in ends) - 1
        assert truncated == (cut not in ends)


def test_a_log_with_foreign_bytes_is_refused() -> None:
    with pytest.raises(LogError, match=f"at byte {RECORD.size} "):
        parse_log(encode_record(10) + struct.pack("<Q", 99) * 20)


# ---- the model ----


def change(offset: int, data: bytes, resizes_to: int | None = None) -> FileChange:
    return FileChange(0, 1, "", offset, len(data), data, resizes_to, 0, 512)


def cut(resizes_to: int) -> FileChange:
    return FileChange(0, 1, "", 0, 0, None, resizes_to, 0, 512)


def test_image_agrees_with_a_bytearray() -> None:
    import random

    source = random.Random(1)
    image, plain = Image(), bytearray()
    for _ in range(400):
        offset, length = source.randrange(20000), source.randrange(1, 9000)
        match source.randrange(3):
            case 0:
                size = source.randrange(20000)
                image.resize(size)
                plain = plain[:size].ljust(size, b"\0")
            case 1:
                data = source.randbytes(length)
                image.put(offset, data)
                part = data[: max(0, len(plain) - offset)]
                plain[offset : offset + len(part)] = part
            case _:
                image.clear(offset, length)
                end = max(offset, min(len(plain), offset + length))
                plain[offset:end] = bytes(len(plain[offset:end]))
        assert image.contents() == plain


def test_a_page_is_a_hole_until_it_is_written_and_where_it_was_cleared_as_a_whole() -> None:
    image = Image(5 * 4096)
    image.clear(100, 4096)
    assert list(image.runs()) == []
    image.put(4096, bytes(3 * 4096))
    image.clear(3 * 4096 - 1, 4097)
    assert list(image.runs()) == [(4096, bytes(8192))]
    image.clear(4096 + 1, 8192)
    assert list(image.runs()) == [(4096, bytes(4096))]


def test_a_write_tears_at_sectors_of_the_file_not_of_the_write() -> None:
    write = change(500, b"n" * 600)
    torn = settle_file(Image.of(b"o" * 2048), [write], Selection(units=lambda _: frozenset({1})))
    assert write.units() == 3
    assert torn.contents() == b"o" * 512 + b"n" * 512 + b"o" * 1024


def test_growth_without_bytes_reads_zero() -> None:
    grown = settle_file(Image.of(b"o" * 10), [change(10, b"n" * 10, 20)], Selection(units=lambda _: frozenset()))
    assert grown.contents() == b"o" * 10 + bytes(10)


def test_bytes_without_growth_are_not_there() -> None:
    kept = settle_file(Image.of(b"o" * 10), [change(5, b"n" * 10, 15)], Selection(sizes=lambda _: False))
    assert kept.contents() == b"o" * 5 + b"n" * 5


def test_sizes_persist_in_order() -> None:
    first, second = change(0, b"a" * 10, 10), change(10, b"b" * 10, 20)
    kept = settle_file(Image(), [first, second], Selection(sizes=lambda size: size is second))
    assert kept.size_bytes == 0


def test_what_is_written_after_a_truncation_needs_it() -> None:
    changes = [cut(4), change(4, b"n" * 4, 8)]
    kept = settle_file(Image.of(b"o" * 8), changes, Selection(sizes=lambda _: False))
    assert kept.contents() == b"o" * 8
    assert settle_file(Image.of(b"o" * 8), changes, ALL).contents() == b"oooonnnn"


def test_a_change_of_size_alone_brings_its_mtime() -> None:
    grown = FileChange(0, 1, "", 0, 0, None, 20, 777, 512)
    assert settle_file(Image.of(b"o" * 10, 5), [grown], ALL).mtime_ns == 777
    assert settle_file(Image.of(b"o" * 10, 5), [grown], Selection(sizes=lambda _: False)).mtime_ns == 5


def test_a_sector_is_as_it_was_at_one_moment() -> None:
    first, second = change(0, b"1" * 16), change(16, b"2" * 16)
    kept = settle_file(
        Image.of(b"o" * 1024),
        [first, second],
        Selection(units=lambda c: None if c is second else frozenset()),
    )
    assert kept.contents() == b"1" * 16 + b"2" * 16 + b"o" * 992


def test_a_sector_does_not_bring_back_what_a_truncation_cut_off() -> None:
    last = change(20, b"3" * 4, 24)
    changes = [change(0, b"1" * 512), cut(16), last]
    kept = settle_file(Image.of(b"o" * 512), changes, Selection(units=lambda c: None if c is last else frozenset()))
    assert kept.contents() == b"1" * 16 + bytes(4) + b"3" * 4


def states_of(root: Path, program: Callable[[Path], None], kind: str) -> list[dict[str, bytes]]:
    states: list[State] = list(choose_states(run(program, root), [kind]))
    return [{path: file.image.contents() for path, file in state.files.items()} for state in states]


def two_writes(root: Path) -> None:
    import os

    file = os.open(root / "file", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(file, b"o" * 1024, 0)
    os.fsync(file)
    os.fsync(os.open(root, os.O_RDONLY))
    os.pwrite(file, b"1" * 1024, 0)
    os.pwrite(file, b"2" * 512, 1024)
    os.rename(root / "file", root / "renamed")
    os.fsync(file)


OLD, NEW = b"o" * 1024, b"1" * 1024 + b"2" * 512


def test_prefix_states_are_what_the_program_saw(root: Path) -> None:
    assert states_of(root, two_writes, "prefix") == [
        {"file": b""},
        {"file": OLD},
        {"file": b"1" * 1024},
        {"file": NEW},
        {"renamed": NEW},
    ]


def test_durable_states_hold_only_what_was_synced(root: Path) -> None:
    assert states_of(root, two_writes, "durable") == [{}, {"file": OLD}, {"file": NEW}]


def test_names_states_hold_unsynced_names_without_their_bytes(root: Path) -> None:
    assert states_of(root, two_writes, "names") == [
        {"file": b""},
        {"file": OLD},
        {"renamed": OLD},
        {"renamed": NEW},
    ]


def test_bytes_states_hold_unsynced_bytes_under_old_names(root: Path) -> None:
    assert states_of(root, two_writes, "bytes") == [{}, {"file": NEW}]


def test_zeros_states_grow_without_bytes(root: Path) -> None:
    assert {"renamed": OLD + bytes(512)} in states_of(root, two_writes, "zeros")


def test_dropped_states_leave_out_one_change_each(root: Path) -> None:
    states = states_of(root, two_writes, "dropped")
    assert {"renamed": OLD + b"2" * 512} in states
    assert {"renamed": b"1" * 1024} in states
    assert {"renamed": b"1" * 1024 + bytes(512)} in states
    assert {"file": NEW} in states


def test_torn_states_mix_sectors_of_one_write(root: Path) -> None:
    states = states_of(root, two_writes, "torn")
    assert {"renamed": b"1" * 512 + b"o" * 512 + b"2" * 512} in states
    assert {"renamed": b"o" * 512 + b"1" * 512 + b"2" * 512} in states


def test_random_states_follow_the_seed(root: Path) -> None:
    recording = run(two_writes, root)

    def digests(seed: int) -> list[bytes]:
        return [state.digest for state in choose_states(recording, ["random"], seed=seed)]

    assert digests(1) == digests(1)
    assert len({tuple(digests(seed)) for seed in range(10)}) > 1


def test_a_limit_chooses_that_many_plans_by_seed(root: Path) -> None:
    recording = run(two_writes, root)
    assert 5 < len(list(choose_states(recording, limit=12, seed=3))) <= 12


def hole_program(root: Path) -> None:
    import ctypes
    import os

    file = os.open(root / "file", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(file, b"o" * 12288, 0)
    os.fsync(file)
    os.fsync(os.open(root, os.O_RDONLY))
    # By name, because it has to go through the recorder; Python has no fallocate with a mode.
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(file, 3, 2048, 6144) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_a_punched_hole_may_be_there_or_not_or_in_part(root: Path) -> None:
    punched = b"o" * 2048 + bytes(6144) + b"o" * 4096
    half = b"o" * 2048 + bytes(2048) + b"o" * 8192
    assert PUNCH_HOLE | KEEP_SIZE == 3
    assert {"file": punched} in states_of(root, hole_program, "prefix")
    states = states_of(empty(root), hole_program, "torn")
    assert {"file": half} in states
    assert states_of(empty(root), hole_program, "durable")[-1] == {"file": b"o" * 12288}


def empty(root: Path) -> Path:
    for path in root.iterdir():
        path.unlink()
    return root


def test_a_sync_covers_only_what_ended_before_it_began() -> None:
    def record(kind: int, inode: int = 5, sync: int = 0, data: bytes = b"", path: bytes = b"", flags: int = 0) -> bytes:
        fields = (RECORD_MAGIC, kind, inode, 1, 0, 0, 0, sync, len(data), flags, len(path), 0, 7)
        return RECORD.pack(*fields) + path + data

    log = [record(1, path=b"file"), record(8, 9, sync=1), record(9, 9, sync=1)]  # made, and its name durable
    log += [record(8, sync=2), record(3, data=b"late", path=b"file"), record(9, sync=2)]
    entries, _ = parse_log(b"".join(log))
    recording = Recording(Path("unused"), entries, False, [], (1, 9), "")
    last = list(choose_states(recording, ["durable"]))[-1]
    assert last.files["file"].image.contents() == b""


# ---- a crash, a second program, and another crash ----


def recover_program(root: Path) -> None:
    """Reads what is there and says so: without a sync, which is what the tests want to be found."""
    from crash.harness.run import mark

    mark(root, "read " + (root / "file").read_text()[:4])


def recover_and_sync_program(root: Path) -> None:
    import os

    from crash.harness.run import mark

    file = os.open(root / "file", os.O_RDWR)
    os.fsync(file)
    os.fsync(os.open(root, os.O_RDONLY))
    mark(root, "read " + os.pread(file, 4, 0).decode())


def check_read(directory: Path, markers: Sequence[str]) -> list[str]:
    reads = [marker for marker in markers if marker.startswith("read")]
    found = (directory / "file").read_text()[:4] if reads else ""
    return [] if not reads or reads == [f"read {found}"] else [f"{reads[-1]}, and now {found}"]


@pytest.mark.parametrize(("program", "is_found"), [(recover_program, True), (recover_and_sync_program, False)])
def test_what_a_second_program_read_is_lost_unless_it_synced_what_it_found(
    root: Path, program: Callable[[Path], None], is_found: bool
) -> None:
    def first(root: Path) -> None:
        import os

        file = os.open(root / "file", os.O_RDWR | os.O_CREAT, 0o644)
        os.write(file, b"old!")
        os.fsync(file)
        os.fsync(os.open(root, os.O_RDONLY))
        os.pwrite(file, b"new!", 0)

    recording = run(first, root)
    resumed = resume(recording, len(recording.entries), program)
    report = check_states(resumed, check_read)
    assert bool(report.violations) == is_found, report
    assert contents_below(root) == {"file": b"new!"}


def wipe_without_sync_program(root: Path) -> None:
    """Overwrites the first page with zeros, punches the second, and leaves the third."""
    import ctypes
    import os

    file = os.open(root / "file", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(file, b"o" * 12288, 0)
    os.fsync(file)
    os.fsync(os.open(root, os.O_RDONLY))
    os.pwrite(file, bytes(4096), 0)
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(file, 3, 4096, 4096) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def seek_program(root: Path) -> None:
    """Says where data begins, looked for from each page on."""
    import os

    from crash.harness.run import mark

    file = os.open(root / "file", os.O_RDWR)
    mark(root, " ".join(str(os.lseek(file, page, os.SEEK_DATA)) for page in (0, 4096, 8192)))


def test_a_second_program_finds_a_hole_where_the_first_punched_and_not_where_it_wrote_zeros(root: Path) -> None:
    recording = run(wipe_without_sync_program, root)
    resumed = resume(recording, len(recording.entries), seek_program)
    (last,) = (entry.data for entry in resumed.entries if entry.kind == MARK)
    assert last == b"0 8192 8192"


# ---- states on disk ----


def test_states_are_made_in_the_recorded_root_with_known_inodes_and_mtimes(root: Path) -> None:
    (root / "base").write_bytes(b"base")
    os.utime(root / "base", ns=(10**18, 10**18 + 5))
    inode = (root / "base").stat().st_ino

    def program(root: Path) -> None:
        import os

        (root / "new").write_bytes(b"new")
        os.unlink(root / "base")

    recording = run(program, root)
    found = []

    def checker(directory: Path, markers: Sequence[str]) -> list[str]:
        assert directory == root
        if (directory / "base").exists():
            state = (directory / "base").stat()
            found.append((state.st_ino, state.st_mtime_ns, (directory / "base").read_bytes()))
        (directory / "left by the checker").write_bytes(b"?")
        return ["left over"] if len(list(directory.iterdir())) > 3 else []

    # The program's unlink takes the inode along; a link beside the root keeps it for the states.
    report = check_states(recording, checker)
    assert not report.violations, report
    assert {entry[1:] for entry in found} == {(10**18 + 5, b"base")}
    assert len({entry[0] for entry in found}) == 1
    assert inode
    assert contents_below(root) == {"new": b"new"}


def wiping_program(root: Path, *, sync: bool = True, zeros: bool = True) -> None:
    """Gives back a file whose bytes were durable, overwritten or not."""
    import os

    os.mkdir(root / "segments")
    file = os.open(root / "segments" / "one", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(file, b"s" * 8192, 0)
    os.fsync(file)
    if zeros:
        os.pwrite(file, bytes(4096), 4096)
    if sync:
        os.fsync(file)
    os.unlink(root / "segments" / "one")


def test_what_was_wiped_before_it_was_unlinked_is_no_problem(root: Path) -> None:
    assert freed_unwiped(run(wiping_program, root).replay(), ["segments"]) == []


def test_a_header_that_was_written_with_zeros_behind_it_is_no_problem(root: Path) -> None:
    def program(root: Path) -> None:
        import os

        os.mkdir(root / "layers")
        os.pwrite(os.open(root / "layers" / "one", os.O_RDWR | os.O_CREAT, 0o644), b"h" * 4096 + bytes(4096), 0)
        os.unlink(root / "layers" / "one")

    assert freed_unwiped(run(program, root).replay(), ["layers"]) == []


@pytest.mark.parametrize("removed", ["sync", "zeros"])
def test_what_was_unlinked_before_it_was_wiped_is_found(root: Path, removed: str) -> None:
    recording = run(without(wiping_program, **{removed: False})(root), root)
    assert len(freed_unwiped(recording.replay(), ["segments"])) == 1
    assert freed_unwiped(recording.replay(), ["layers"]) == []


def test_what_a_checker_raises_is_a_violation(root: Path) -> None:
    recording = run(two_writes, root)

    def checker(directory: Path, markers: Sequence[str]) -> list[str]:
        json.loads("{")
        return []

    report = check_states(recording, checker, violations_max=1)
    assert report.tried == 1
    assert report.violations[0].problems[0].startswith("JSONDecodeError")
