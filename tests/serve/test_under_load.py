"""Operations while clients write and read: each snapshot is a point in time, and merges keep to their rate."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.servers import COMMAND, END_SECONDS, Serve, onionskin, onionskin_json

import onionskin as library

BLOCK = 4096
MIB = 1 << 20
WRITERS = 3
SNAPSHOTS = 6
Start = Callable[..., Serve]


def stamp(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def number_of(block: bytes) -> int:
    number = int.from_bytes(block[:8], "little")
    assert block == stamp(number), "a block is torn between two writes"
    return number


class Writer(threading.Thread):
    """Writes 1, 2, 3... to its own block; `acknowledged` follows each write, `begun` goes before it."""

    def __init__(self, client: NbdClient, index: int) -> None:
        super().__init__()
        self.client, self.index = client, index
        self.begun = self.acknowledged = 1
        self.ending = threading.Event()
        self.moved = threading.Condition()
        self.failure: BaseException | None = None
        client.write(index * BLOCK, stamp(1))

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self.begun += 1
                self.client.write(self.index * BLOCK, stamp(self.begun))
                with self.moved:
                    self.acknowledged = self.begun
                    self.moved.notify_all()
        except BaseException as error:
            self.failure = error
            with self.moved:
                self.moved.notify_all()

    def wait_for_more(self, count: int) -> None:
        """Return when `count` more writes were acknowledged."""
        with self.moved:
            wanted = self.acknowledged + count
            assert self.moved.wait_for(lambda: self.acknowledged >= wanted or self.failure, END_SECONDS)
        assert self.failure is None, self.failure


@contextmanager
def writers(server: Serve) -> Iterator[list[Writer]]:
    running = [Writer(server.client(), index) for index in range(WRITERS)]
    for writer in running:
        writer.start()
    try:
        yield running
    finally:
        for writer in running:
            writer.ending.set()
            writer.join()
            writer.client.close()
        assert [writer.failure for writer in running] == [None] * WRITERS


def test_a_snapshot_under_load_holds_all_that_was_acknowledged_and_nothing_that_began_after(
    vms: Path, serve: Start
) -> None:
    server = serve(f"{vms}/web")
    bounds = []
    with writers(server) as running, library.connect(vms, "web") as web:
        for number in range(SNAPSHOTS):
            for writer in running:
                writer.wait_for_more(5)
            least = [writer.acknowledged for writer in running]
            web.snapshot(f"s{number}")
            bounds.append((least, [writer.begun for writer in running]))
            if number == 3:
                web.merge("s2")
    for number, (least, most) in enumerate(bounds):
        if number != 2:
            with server.client(f"web@s{number}") as view:
                seen = [number_of(view.read(index * BLOCK, BLOCK)) for index in range(WRITERS)]
            assert all(low <= one <= high for low, one, high in zip(least, seen, most, strict=True)), (
                least,
                seen,
                most,
            )


@pytest.mark.slow
def test_a_merge_into_the_base_keeps_to_its_rate_while_clients_write_and_snapshots_are_taken(
    vms: Path, serve: Start, tmp_path: Path
) -> None:
    """At the rate it would take four minutes: it is there for as long as is needed, then stopped, and goes on without one."""
    server = serve(f"{vms}/web")
    with server.client() as client:
        for at in range(8, 24):
            client.write(at * MIB, bytes([at + 100]) * MIB)
    onionskin("snapshot", f"{vms}/web@full")
    with writers(server) as running:
        began = time.monotonic()
        with subprocess.Popen(
            [*COMMAND, "merge", f"{vms}/web@full", "--into-base", "--rate", "64K"], stderr=subprocess.PIPE
        ) as merge:
            wait_until_the_base_changes(tmp_path / "base.raw")
            for writer in running:
                writer.wait_for_more(20)
            with library.connect(vms, "web") as web:
                web.snapshot("meanwhile")
                with pytest.raises(library.StateError, match="is under way"):
                    web.merge("meanwhile")
            assert merge.poll() is None
            merged = sum(base_has_changed(tmp_path / "base.raw"))
            assert (merged - 2) * MIB < (time.monotonic() - began) * 65536  # some more in the first moment
            merge.send_signal(signal.SIGINT)
            assert merge.wait(END_SECONDS) == 130
        merge_when_the_old_one_has_ended(vms, "full")
        for writer in running:
            writer.wait_for_more(5)
    base = (tmp_path / "base.raw").read_bytes()
    assert [base[at * MIB] for at in range(8, 24)] == [at + 100 for at in range(8, 24)]
    with server.client() as client:
        assert client.read(9 * MIB, BLOCK) == bytes([109]) * BLOCK
        assert number_of(client.read(0, BLOCK)) == running[0].acknowledged
    with server.client("web@meanwhile") as view:
        assert number_of(view.read(0, BLOCK)) <= running[0].acknowledged


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_a_merge_into_the_base_that_was_cancelled_goes_on_when_it_is_called_again(
    vms: Path, serve: Start, tmp_path: Path, sent: signal.Signals
) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"n" * 32 * MIB)
        with subprocess.Popen(
            [*COMMAND, "merge", f"{vms}/web", "--into-base", "--rate", "64K"], stderr=subprocess.PIPE
        ) as merge:
            wait_until_the_base_changes(tmp_path / "base.raw")
            merge.send_signal(sent)
            assert merge.wait(END_SECONDS) == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        client.write(40 * MIB, b"later" * 4096)
        assert client.read(0, 2 * MIB) == b"n" * 2 * MIB
        merge_when_the_old_one_has_ended(vms)
        assert client.read(0, 32 * MIB) == b"n" * 32 * MIB
    assert server.terminate() == 0
    base = (tmp_path / "base.raw").read_bytes()
    assert base[: 32 * MIB] == b"n" * 32 * MIB
    assert base[40 * MIB :][: 5 * 4096] == b"later" * 4096
    assert onionskin("check", vms).stdout.endswith("no problem found\n")
    assert onionskin("read", f"{vms}/web", "40M", 5).stdout == "later"


def base_has_changed(base: Path) -> list[bool]:
    """Return for each MiB of the base whether something was merged into its first block."""
    with base.open("rb") as file:
        return [os.pread(file.fileno(), 1, at * MIB)[0] != at for at in range(64)]


def wait_until_the_base_changes(base: Path) -> None:
    """Nothing tells us but the file: looked at again and again, the process itself keeps no one informed."""
    deadline = time.monotonic() + END_SECONDS
    while not any(base_has_changed(base)):
        assert time.monotonic() < deadline, "the merge did not begin"
        time.sleep(0.02)


def merge_when_the_old_one_has_ended(vms: Path, upto: str | None = None) -> None:
    """The server hears of a caller that was killed within a fraction of a second; until then it is busy."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            with library.connect(vms, "web") as web:
                web.merge_into_base(upto)
            return
        except library.StateError as busy:
            assert "is under way" in str(busy)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
def test_a_server_that_is_told_to_end_during_a_merge_ends_and_the_next_one_can_finish_it(
    vms: Path, serve: Start, tmp_path: Path
) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"n" * 32 * MIB)
    with subprocess.Popen(
        [*COMMAND, "merge", f"{vms}/web", "--into-base", "--rate", "64K"], stderr=subprocess.PIPE, text=True
    ) as merge:
        wait_until_the_base_changes(tmp_path / "base.raw")
        assert server.terminate() == 0
        _, said = merge.communicate(timeout=END_SECONDS)
        assert merge.returncode in (5, 130), said
    server = serve(f"{vms}/web")
    with server.client() as client:
        assert client.read(0, 32 * MIB) == b"n" * 32 * MIB
        subprocess.run([*COMMAND, "merge", f"{vms}/web", "--into-base"], check=True, timeout=END_SECONDS)
        assert client.read(0, 32 * MIB) == b"n" * 32 * MIB
    assert (tmp_path / "base.raw").read_bytes()[: 32 * MIB] == b"n" * 32 * MIB


@pytest.mark.slow
def test_progress_of_a_merge_reaches_the_caller(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"n" * 8 * MIB)
    seen: list[tuple[int, int]] = []
    with library.connect(vms, "web") as web:
        web.merge_into_base(progress=lambda done, total: seen.append((done, total)), bytes_per_second=8 * MIB)
    assert seen
    assert all(0 <= done <= total == 8 * MIB for done, total in seen)
    assert onionskin_json("usage", f"{vms}/web")[-1]["bytes_held"] == 0


def test_a_server_that_is_told_to_end_under_load_keeps_all_that_it_acknowledged(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    running = [Writer(server.client(), index) for index in range(WRITERS)]
    for writer in running:
        writer.start()
    for writer in running:
        writer.wait_for_more(20)
    assert server.terminate() == 0
    for writer in running:
        writer.join()
        writer.client.close()
        assert isinstance(writer.failure, OSError)
    with library.Store(vms) as store, store.open("web") as web:
        for writer in running:
            assert writer.acknowledged <= number_of(web.read(writer.index * BLOCK, BLOCK)) <= writer.begun
