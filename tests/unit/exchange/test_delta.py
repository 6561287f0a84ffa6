"""The delta stream: it brings another store to the same bytes, and nothing else brings it anywhere."""

import hashlib
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin import delta
from onionskin.catalog import LayerRow
from onionskin.delta import COUNTS, CRC, DATA, END, HEADER, RECORD, ZERO, Delta
from onionskin.errors import (
    ChainError,
    FormatError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StateError,
)
from onionskin.store import Store
from onionskin.volume import Volume

BLOCK = 4096
SIZE = 16 * BLOCK


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        yield here, there


def stream_of(store: Store, a: str | None, b: str) -> bytes:
    out = io.BytesIO()
    delta.delta(store, "web", a, b, out)
    return out.getvalue()


def apply(store: Store, stream: bytes, volume: str = "web") -> None:
    with store.open(volume) as opened:
        delta.apply(io.BytesIO(stream), opened)


def contents(store: Store, volume: str = "web", snapshot: str | None = None) -> bytes:
    with store.open(volume, snapshot=snapshot) as opened:
        return opened.read(0, opened.size_bytes)


@pytest.fixture
def pair(stores: tuple[Store, Store]) -> tuple[Store, Store]:
    """Two stores whose volume web is at snapshot a; here it has a snapshot b too."""
    here, there = stores
    with here.create("web", size=SIZE) as web:
        web.write(0, b"a" * 3 * BLOCK)
        web.snapshot("a", "the start")
    there.create("web", size=BLOCK).close()
    apply(there, stream_of(here, None, "a"))
    with here.open("web") as web:
        web.write(2 * BLOCK, b"b" * 2 * BLOCK)
        web.zero(0, BLOCK)
        web.snapshot("b", "the end")
    return here, there


def test_a_stream_of_a_whole_snapshot_fills_an_empty_volume(pair: tuple[Store, Store]) -> None:
    here, there = pair
    assert contents(there) == contents(here, snapshot="a") == b"a" * 3 * BLOCK + bytes(13 * BLOCK)


def test_a_stream_brings_the_same_snapshot_with_its_guid_and_note(pair: tuple[Store, Store]) -> None:
    here, there = pair
    apply(there, stream_of(here, "a", "b"))
    assert contents(there) == contents(here)
    for ours, theirs in zip(here.snapshots("web"), there.snapshots("web"), strict=True):
        assert (ours.name, ours.guid, ours.note, ours.parent) == (
            theirs.name,
            theirs.guid,
            theirs.note,
            theirs.parent,
        )


def test_only_what_changed_is_in_the_stream(pair: tuple[Store, Store]) -> None:
    here, _ = pair
    out = io.BytesIO()
    sent = delta.delta(here, "web", "a", "b", out)
    assert (sent.data_bytes, sent.zero_bytes) == (2 * BLOCK, BLOCK)
    assert len(out.getvalue()) < 2 * BLOCK + 1024


def test_a_whole_stream_holds_what_the_base_holds(stores: tuple[Store, Store], tmp_path: Path) -> None:
    here, there = stores
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(BLOCK) + b"base" * BLOCK + bytes(BLOCK) + b"end")
    with here.create("web", base=base, size=SIZE) as web:
        web.write(2 * BLOCK, b"w" * BLOCK)
        web.trim(3 * BLOCK, BLOCK)
        web.snapshot("b")
    there.create("web", size=SIZE).close()
    apply(there, stream_of(here, None, "b"))
    assert contents(there) == contents(here)


def test_volumes_of_other_block_sizes_can_follow(stores: tuple[Store, Store]) -> None:
    here, there = stores
    with here.create("web", size=SIZE) as web:
        web.write(5000, b"x" * 10000)
        web.snapshot("a")
        web.write(30000, b"y" * 100)
        web.trim(0, 4 * BLOCK)
        web.snapshot("b")
    there.create("web", size=SIZE, block_size=4 * BLOCK).close()
    apply(there, stream_of(here, None, "a"))
    apply(there, stream_of(here, "a", "b"))
    assert contents(there) == contents(here)


changes = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "trim", "resize"]), st.integers(0, SIZE), st.integers(1, 5 * BLOCK)),
    max_size=8,
)


def change(web: Volume, what: str, at: int, length: int) -> None:
    if what == "resize":
        web.resize(max(512, at // 512 * 512), force=True)
        return
    at %= web.size_bytes
    length = min(length, web.size_bytes - at)
    if what == "write":
        web.write(at, bytes([length % 255 + 1]) * length)
    else:
        getattr(web, what)(at, length)


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=changes, after=changes)
def test_whatever_was_done_the_receiver_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[str, int, int]],
    after: list[tuple[str, int, int]],
) -> None:
    tmp_path = tmp_path_factory.mktemp("delta")
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        with here.create("web", size=SIZE) as web:
            for what, at, length in before:
                change(web, what, at, length)
            web.snapshot("a")
            for what, at, length in after:
                change(web, what, at, length)
            web.snapshot("b")
        there.create("web", size=SIZE).close()
        apply(there, stream_of(here, None, "a"))
        apply(there, stream_of(here, "a", "b"))
        assert contents(there) == contents(here)
        assert contents(there, snapshot="a") == contents(here, snapshot="a")


def test_a_stream_that_was_applied_is_not_applied_again(pair: tuple[Store, Store]) -> None:
    here, there = pair
    stream = stream_of(here, "a", "b")
    apply(there, stream)
    with pytest.raises(ChainError, match="does not start"):
        apply(there, stream)


def test_a_head_that_was_written_to_is_refused(pair: tuple[Store, Store]) -> None:
    here, there = pair
    with there.open("web") as web:
        web.write(0, b"mine")
    with pytest.raises(StateError, match="revert to 'a'"):
        apply(there, stream_of(here, "a", "b"))
    assert contents(there)[:4] == b"mine"


def test_a_volume_that_holds_data_is_refused_by_a_whole_stream(pair: tuple[Store, Store]) -> None:
    here, there = pair
    with there.create("other", size=SIZE) as other:
        other.write(0, b"mine")
    with pytest.raises(ChainError, match="not empty"):
        apply(there, stream_of(here, None, "b"), "other")
    assert contents(there, "other")[:4] == b"mine"


def test_a_snapshot_of_that_name_is_refused(pair: tuple[Store, Store]) -> None:
    here, there = pair
    with here.open("web") as web:
        web.revert("b")
    with there.open("web") as web:
        web.write(0, b"mine")
        web.snapshot("b")
        web.revert("a")
    with pytest.raises(SnapshotExistsError):
        apply(there, stream_of(here, "a", "b"))


def test_a_snapshot_that_does_not_exist_is_named(pair: tuple[Store, Store]) -> None:
    here, _ = pair
    with pytest.raises(SnapshotNotFoundError, match="'c'"):
        stream_of(here, "a", "c")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_stream_that_is_cut_short_changes_nothing(pair: tuple[Store, Store], kept: float) -> None:
    here, there = pair
    stream = stream_of(here, "a", "b")
    before = contents(there)
    with pytest.raises(FormatError, match="ends early"):
        apply(there, stream[: int(len(stream) * kept)])
    assert contents(there) == before
    apply(there, stream)
    assert contents(there) == contents(here)


def test_a_whole_stream_that_is_cut_short_can_be_applied_again(pair: tuple[Store, Store]) -> None:
    here, there = pair
    there.create("copy", size=3 * BLOCK).close()
    stream = stream_of(here, None, "b")
    with pytest.raises(FormatError):
        apply(there, stream[:-1], "copy")
    assert contents(there, "copy") == bytes(3 * BLOCK)
    apply(there, stream, "copy")
    assert contents(there, "copy") == contents(here)


def test_an_interrupted_apply_puts_the_head_back(pair: tuple[Store, Store]) -> None:
    here, there = pair
    before = contents(there)

    class Interrupted(io.BytesIO):
        def read(self, length: int | None = -1, /) -> bytes:
            if self.tell() > BLOCK:
                raise KeyboardInterrupt
            return super().read(length)

    with there.open("web") as web:
        with pytest.raises(KeyboardInterrupt):
            delta.apply(Interrupted(stream_of(here, "a", "b")), web)
        assert web.read(0, web.size_bytes) == before
        assert [snapshot.name for snapshot in web.snapshots] == ["a"]


def test_a_stream_may_arrive_in_any_pieces(pair: tuple[Store, Store]) -> None:
    here, there = pair

    class Slow(io.BytesIO):
        def read(self, length: int | None = -1, /) -> bytes:
            return super().read(min(length or 0, 7))

    with there.open("web") as web:
        delta.apply(Slow(stream_of(here, "a", "b")), web)
    assert contents(there) == contents(here)


def test_a_whole_stream_of_a_snapshot_that_is_older_than_a_flatten_holds_its_base(
    stores: tuple[Store, Store], tmp_path: Path
) -> None:
    here, there = stores
    (tmp_path / "base.raw").write_bytes(b"base" * BLOCK)
    with here.create("web", base=tmp_path / "base.raw") as web:
        web.write(0, b"w" * BLOCK)
        web.snapshot("a")
        web.flatten()
    there.create("web", size=BLOCK).close()
    apply(there, stream_of(here, None, "a"))
    assert contents(there) == contents(here, snapshot="a") == b"w" * BLOCK + b"base" * (3 * BLOCK // 4)


@pytest.mark.parametrize("a", [None, "a"])
def test_a_snapshot_that_takes_the_name_of_another_while_a_stream_begins_is_not_mixed_with_it(
    pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch, a: str | None
) -> None:
    here, there = pair
    with here.open("web") as web:
        web.revert("a")
        real = Store.open

        def exchange(store: Store, name: str, *, snapshot: str | None = None, verify: bool = False) -> Volume:
            monkeypatch.setattr(Store, "open", real)
            web.discard("b")
            web.write(5 * BLOCK, b"n" * BLOCK)
            web.snapshot("b", "the new one")
            return real(store, name, snapshot=snapshot, verify=verify)

        monkeypatch.setattr(Store, "open", exchange)
        stream = stream_of(here, a, "b")
    there.create("new", size=BLOCK).close()
    apply(there, stream, "new" if a is None else "web")
    receiver = "new" if a is None else "web"
    (ours,) = [snapshot for snapshot in here.snapshots("web") if snapshot.name == "b"]
    (theirs,) = [snapshot for snapshot in there.snapshots(receiver) if snapshot.name == "b"]
    assert (ours.guid, ours.note) == (theirs.guid, theirs.note)
    assert contents(there, receiver) == contents(here, snapshot="b")


def test_a_base_that_changes_under_a_stream_leaves_one_that_is_refused(
    stores: tuple[Store, Store], tmp_path: Path
) -> None:
    here, there = stores
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * BLOCK)
    with here.create("web", base=base) as web:
        web.snapshot("a")
    out = io.BytesIO()
    with pytest.raises(ChainError, match="has changed"):
        delta.delta(here, "web", None, "a", out, progress=lambda done, total: os.utime(base, ns=(0, 0)))
    there.create("web", size=BLOCK).close()
    with pytest.raises(FormatError, match="ends early"):
        apply(there, out.getvalue())


base_changes = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "trim", "resize"]), st.integers(0, SIZE), st.integers(1, 5 * BLOCK)),
    max_size=6,
)


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, SIZE), after=base_changes)
def test_a_receiver_on_the_same_base_reads_the_same_whatever_was_zeroed_cut_or_grown(
    tmp_path_factory: pytest.TempPathFactory, size: int, after: list[tuple[str, int, int]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("delta")
    (tmp_path / "base.raw").write_bytes(b"base" * (SIZE // 4 - 100))
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        for store in (here, there):
            with store.create("web", base=tmp_path / "base.raw", size=size) as web:
                web.write(0, b"w" * min(size, 5000))
                web.snapshot("a", guid="ab" * 16)
        with here.open("web") as web:
            for what, at, length in after:
                change(web, what, at, length)
            web.snapshot("b")
        apply(there, stream_of(here, "a", "b"))
        assert contents(there) == contents(here)
        for store in (here, there):
            with store.open("web") as web:
                web.resize(2 * SIZE)
        assert contents(there) == contents(here)
        assert there.check() == []


def test_a_disk_that_grows_over_its_base_reads_zero_there_though_no_record_says_so(
    stores: tuple[Store, Store], tmp_path: Path
) -> None:
    _, there = stores
    (tmp_path / "base.raw").write_bytes(b"b" * 8 * BLOCK)
    with there.create("web", base=tmp_path / "base.raw", size=2 * BLOCK) as web:
        web.snapshot("a", guid=HEAD.guid_a.hex())
    head = replace(HEAD, size_a=2 * BLOCK, size_b=8 * BLOCK)
    apply(there, ended(header_of(head), 0, 0, 0, 8 * BLOCK))
    assert contents(there) == b"b" * 2 * BLOCK + bytes(6 * BLOCK)


def test_what_is_written_to_the_head_while_a_stream_arrives_is_kept_and_the_stream_refused(
    pair: tuple[Store, Store],
) -> None:
    here, there = pair
    with there.open("web") as web:

        def write(done: int, total: int) -> None:
            web.write(9 * BLOCK, b"mine")

        with pytest.raises(StateError, match="written to meanwhile"):
            delta.apply(io.BytesIO(stream_of(here, "a", "b")), web, progress=write)
        assert web.read(9 * BLOCK, 4) == b"mine"
        assert [snapshot.name for snapshot in web.snapshots] == ["a"]
    assert [volume.name for volume in there.volumes()] == ["web"]
    assert there.check() == []


KILLED = """
import io, os, signal, sys
from onionskin import Store, delta

class Killed(io.FileIO):
    def read(self, length=-1, /):
        if self.tell() >= int(sys.argv[3]):
            os.kill(os.getpid(), signal.Signals[sys.argv[4]])
        return super().read(length)

with Store(sys.argv[1]) as store, store.open(sys.argv[5]) as volume:
    delta.apply(Killed(sys.argv[2]), volume)
"""


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(
    "signal_name",
    ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow), pytest.param("SIGHUP", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_killed_apply_leaves_the_volume_as_it_was(
    pair: tuple[Store, Store], tmp_path: Path, whole: bool, signal_name: str
) -> None:
    here, there = pair
    there.create("new", size=BLOCK).close()
    name = "new" if whole else "web"
    stream = stream_of(here, None if whole else "a", "b")
    (tmp_path / "stream").write_bytes(stream)
    before = contents(there, name), there.snapshots(name), len(there._opened.catalog.rows(LayerRow))
    for position in (100, len(stream) // 2, len(stream) - 1):
        arguments = [there.path, tmp_path / "stream", str(position), signal_name, name]
        ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
        assert ended.returncode == -signal.Signals[signal_name], ended.stderr
        assert sorted(volume.name for volume in there.volumes()) == ["new", "web"]
        assert (contents(there, name), there.snapshots(name), len(there._opened.catalog.rows(LayerRow))) == before
    apply(there, stream, name)
    assert contents(there, name) == contents(here, snapshot="b")
    assert there.check() == []


BOUND = """
import io, resource, sys
from onionskin import Store, delta
import numpy

with Store(sys.argv[1]) as store, store.open("web") as volume:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(sys.argv[2], "rb") as stream:
        delta.apply(stream, volume)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    print(volume.size_bytes)
"""


@pytest.mark.parametrize("full", [True, False])
def test_a_short_stream_that_names_the_largest_disk_costs_little(tmp_path: Path, full: bool) -> None:
    """Also where it says of all of that disk that it is zero."""
    size = 64 << 40
    head = replace(HEAD, full=full, guid_a=bytes(16) if full else b"A" * 16, size_a=0 if full else BLOCK, size_b=size)
    body = header_of(head, features=int(full)) + record(ZERO, 0, size)
    (tmp_path / "stream").write_bytes(ended(body, 1, 0, size, size))
    with Store(tmp_path / "store") as store, store.create("web", size=BLOCK) as web:
        web.write(0, b"x" * BLOCK * (not full))
        if not full:
            web.snapshot("a", guid=(b"A" * 16).hex())
    ran = subprocess.run(
        [sys.executable, "-c", BOUND, tmp_path / "store", tmp_path / "stream"],
        check=True,
        capture_output=True,
        text=True,
    )
    mebibytes, size_bytes = map(int, ran.stdout.split())
    assert size_bytes == size
    assert mebibytes < 16
    with Store(tmp_path / "store") as store, store.open("web") as web:
        assert web.read(0, BLOCK) == bytes(BLOCK)


# ---- hostile streams: read without a volume, as nothing of them may get that far ----


def drain(stream: bytes) -> int:
    reader = delta._Reader(io.BytesIO(stream))
    return sum(length for _, length, _ in reader.records(reader.header()))


HEAD = Delta(False, "b", "", b"A" * 16, b"B" * 16, SIZE, SIZE, BLOCK)


def header_of(head: Delta, *, version: int = 1, features: int = 0, name: bytes | None = None) -> bytes:
    name = head.name.encode() if name is None else name
    fixed = HEADER.pack(
        b"ONIONDLT",
        version,
        features,
        head.block_size,
        len(name),
        len(head.note),
        head.size_a,
        head.size_b,
        head.guid_a,
        head.guid_b,
    )
    body = fixed + name + head.note.encode()
    return body + CRC.pack(zlib.crc32(body))


def record(kind: int, offset: int, length: int, payload: bytes = b"") -> bytes:
    crc = zlib.crc32(payload, zlib.crc32(RECORD.pack(kind, 0, offset, length)))
    return RECORD.pack(kind, crc, offset, length) + payload


def ended(body: bytes, records: int, data_bytes: int, zero_bytes: int, size_b: int = SIZE) -> bytes:
    body += record(END, size_b, COUNTS.size + 32, COUNTS.pack(records, data_bytes, zero_bytes))
    return body + hashlib.sha256(body).digest()


def test_a_stream_made_by_hand_from_the_tables_is_read() -> None:
    body = header_of(HEAD) + record(DATA, 0, 4, b"data") + record(ZERO, 8, 8)
    assert drain(ended(body, 2, 4, 8)) == 12


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (record(DATA, SIZE - 2, 4, b"data"), "a record at"),
        (record(ZERO, 0, SIZE + 1), "a record at"),
        (record(ZERO, 0, (1 << 64) - 1), "a record at"),
        (record(ZERO, (1 << 64) - 1, 2), "a record at"),
        (record(ZERO, 0, 0), "a record at"),
        (record(ZERO, 8, 8) + record(ZERO, 8, 8), "a record at"),
        (record(ZERO, 8, 8) + record(ZERO, 0, 8), "a record at"),
        (record(4, 0, 8), "of kind"),
    ],
)
def test_a_record_that_cannot_be_is_refused(records: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        drain(header_of(HEAD) + records)


def test_a_record_larger_than_records_may_be_is_refused_before_it_is_read() -> None:
    large = replace(HEAD, size_b=1 << 40)
    with pytest.raises(FormatError, match="more than a record may have"):
        drain(header_of(large) + RECORD.pack(DATA, 0, 0, 1 << 39))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: header_of(HEAD, version=2), "version 2"),
        (lambda: header_of(HEAD, features=2), "features 0x2"),
        (lambda: header_of(HEAD, name=b"../etc"), "name"),
        (lambda: header_of(HEAD, name=b""), "name"),
        (lambda: header_of(HEAD, name=b"\xff\xfe"), "name"),
        (lambda: header_of(HEAD, name=b"n" * 256), "name"),
        (lambda: header_of(replace(HEAD, note="n" * (1 << 16) + "n")), "note"),
        (lambda: header_of(replace(HEAD, note="a\0b")), "NUL"),
        (lambda: header_of(HEAD, name=b"a\0b"), "name"),
        (lambda: header_of(HEAD, name=b"a/b"), "name"),
        (lambda: header_of(HEAD, name=b"\xed\xb2\x80"), "name"),
        (lambda: header_of(replace(HEAD, size_b=0)), "sizes"),
        (lambda: header_of(replace(HEAD, size_b=(64 << 40) + 1)), "64 TiB"),
        (lambda: header_of(replace(HEAD, size_a=(64 << 40) + 1)), "64 TiB"),
        (lambda: header_of(replace(HEAD, size_b=1 << 63)), "sizes"),
        (lambda: header_of(replace(HEAD, size_a=1 << 63)), "sizes"),
        (lambda: header_of(replace(HEAD, block_size=4095)), "block size"),
        (lambda: header_of(replace(HEAD, block_size=1 << 30)), "block size"),
        (lambda: header_of(replace(HEAD, guid_a=bytes(16))), "start"),
        (lambda: header_of(HEAD, features=1), "start"),
        (lambda: header_of(HEAD)[:-1] + b"!", "CRC-32"),
        (lambda: b"QFI\xfb" + bytes(200), "not a delta stream"),
        (lambda: b"", "ends early"),
    ],
)
def test_a_header_that_cannot_be_is_refused(head: Callable[[], bytes], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        delta.read_header(io.BytesIO(head()))


def test_counts_that_do_not_hold_are_refused() -> None:
    with pytest.raises(FormatError, match="records are missing"):
        drain(ended(header_of(HEAD) + record(ZERO, 8, 8), 2, 0, 8))


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(FormatError, match="follow the END"):
        drain(ended(header_of(HEAD), 0, 0, 0) + b"\0")


def test_no_byte_of_a_stream_can_change_unnoticed() -> None:
    stream = ended(header_of(HEAD) + record(DATA, 0, 4, b"data") + record(ZERO, 8, 8), 2, 4, 8)
    for position in range(len(stream)):
        damaged = bytearray(stream)
        damaged[position] ^= 0x10
        with pytest.raises(FormatError):
            drain(bytes(damaged))


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_format_error(garbage: bytes) -> None:
    for stream in (garbage, header_of(HEAD) + garbage):
        with pytest.raises(FormatError):
            drain(stream)


def test_the_header_is_as_documented() -> None:
    assert struct.unpack_from("<8sII", header_of(HEAD)) == (b"ONIONDLT", 1, 0)
    assert (HEADER.size, RECORD.size, COUNTS.size) == (76, 24, 24)


# ---- a clone that has no snapshot of its own ----


@pytest.fixture
def clones(stores: tuple[Store, Store]) -> Iterator[tuple[Store, Store, bytes]]:
    """Both stores have golden@clean and a clone of it, test-1; and the stream to test-1@done, which is here only."""
    here, there = stores
    with here.create("golden", size=SIZE) as golden:
        golden.write(BLOCK, b"g" * BLOCK)
        golden.snapshot("clean")
    whole = io.BytesIO()
    delta.delta(here, "golden", None, "clean", whole)
    with there.create("golden", size=SIZE) as golden:
        delta.apply(io.BytesIO(whole.getvalue()), golden)
    for store in stores:
        store.clone("golden", "clean", "test-1")
    with here.open("test-1") as test:
        test.write(3 * BLOCK, b"t" * BLOCK)
        test.zero(BLOCK, BLOCK)
        test.snapshot("done")
    stream = io.BytesIO()
    delta.delta(here, None, "golden@clean", "test-1@done", stream)
    yield here, there, stream.getvalue()


def test_a_clone_follows_a_stream_from_the_snapshot_that_it_was_cloned_from(clones: tuple[Store, Store, bytes]) -> None:
    here, there, stream = clones
    apply(there, stream, "test-1")
    assert contents(there, "test-1") == contents(here, "test-1") == contents(there, "test-1", "done")
    assert there.snapshots("test-1")[0].guid == here.snapshots("test-1")[0].guid
    assert contents(there, "golden") == contents(here, "golden", "clean")
    assert there.check() == []


def test_a_clone_then_follows_its_own_snapshots(clones: tuple[Store, Store, bytes]) -> None:
    here, there, stream = clones
    apply(there, stream, "test-1")
    with here.open("test-1") as test:
        test.write(5 * BLOCK, b"u" * BLOCK)
        test.snapshot("more")
    out = io.BytesIO()
    delta.delta(here, "test-1", "done", "more", out)
    apply(there, out.getvalue(), "test-1")
    assert contents(there, "test-1") == contents(here, "test-1")


def test_a_clone_that_was_written_to_is_refused_and_keeps_its_data(clones: tuple[Store, Store, bytes]) -> None:
    _, there, stream = clones
    with there.open("test-1") as test:
        test.write(0, b"mine")
    with pytest.raises(StateError, match="written to after snapshot 'clean'"):
        apply(there, stream, "test-1")
    assert contents(there, "test-1")[:4] == b"mine" and there.snapshots("test-1") == []


def test_a_clone_of_another_snapshot_is_refused(clones: tuple[Store, Store, bytes]) -> None:
    _, there, stream = clones
    with there.open("golden") as golden:
        golden.write(0, b"newer")
        golden.snapshot("newer")
    there.clone("golden", "newer", "test-2")
    with pytest.raises(ChainError, match="stands on snapshot 'newer'"):
        apply(there, stream, "test-2")


def test_a_clone_whose_origin_lost_the_name_below_is_refused(clones: tuple[Store, Store, bytes]) -> None:
    _, there, stream = clones
    with there.open("golden") as golden:
        golden.merge("clean")
    with pytest.raises(ChainError, match="stands on no snapshot"):
        apply(there, stream, "test-1")


def test_a_stream_goes_whole_to_a_file_that_takes_a_part_at_a_time(pair: tuple[Store, Store]) -> None:
    class Part(io.RawIOBase):
        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.taken += data[:100]
            return len(data[:100])

    here, _ = pair
    out = Part()
    delta.delta(here, "web", "a", "b", out)
    assert out.taken == stream_of(here, "a", "b")


def test_a_head_has_no_stream_before_it_has_a_name(pair: tuple[Store, Store]) -> None:
    with pytest.raises(TypeError, match="take one first"):
        delta.delta(pair[0], "web", "a", None, io.BytesIO())  # type: ignore[arg-type]


def test_a_file_that_takes_nothing_is_no_place_for_a_stream(pair: tuple[Store, Store]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "wb", buffering=0) as out, open(reader, "rb"), pytest.raises(BlockingIOError, match="blocking"):
        for _ in range(100):
            delta.delta(pair[0], "web", None, "a", out)
