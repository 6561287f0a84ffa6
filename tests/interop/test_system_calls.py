"""What writes, snapshots and flushes ask of the system, counted with strace: the cost must not grow with the disk."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.servers import COMMAND, END_SECONDS, short_socket

import onionskin

SOURCE = str(Path(onionskin.__file__).parents[1])
PROGRAM = """
import os, sys
sys.path.insert(0, {source!r})
import onionskin
store = onionskin.Store({store!r})
disk = store.create("web", size={size!r})
disk.write(0, b"x" * 65536)
disk.flush()
disk.write(0, b"y" * 65536)
{prepare}
os.close(os.open("/dev/null", os.O_RDONLY))  # begin
{body}
os.close(os.open("/dev/zero", os.O_RDONLY))  # end
"""
CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\(")
ENDED = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\((?!.*<unfinished)| resumed)")


def calls(tmp_path: Path, body: str, *, size: str = "1G", prepare: str = "") -> Counter[str]:
    """Count the system calls of `body`."""
    program = PROGRAM.format(
        source=SOURCE, store=str(tmp_path / f"store-{size}"), size=size, prepare=prepare, body=body
    )
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-o", trace, sys.executable, "-c", program], check=True)
    lines = trace.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"/dev/null"' in line)
    last = next(i for i, line in enumerate(lines) if '"/dev/zero"' in line)
    return Counter(match[1] for line in lines[first + 1 : last] if (match := CALL.match(line)))


def ended_calls(trace: Path) -> Counter[str]:
    """Count the system calls that have returned so far in the threads of a server that answer clients.

    Its background makes files beside them, for the first snapshot.
    """
    ended = [match.groups() for line in trace.read_text().splitlines() if (match := ENDED.match(line))]
    answers = {thread for thread, call in ended if call == "sendmsg"}
    return Counter(call for thread, call in ended if thread in answers)


def calls_with_answers(trace: Path, answers: int) -> Counter[str]:
    """Count them as soon as so many answers are among them: a client has an answer before strace has written of it."""
    deadline = time.monotonic() + END_SECONDS
    while (found := ended_calls(trace))["sendmsg"] < answers:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def syncs(found: Counter[str]) -> int:
    return found["fdatasync"] + found["fsync"]


# As many records have room in the file of pending records at first; then the room doubles, by one call for the file and one
# for the mapping.
FIRST_RECORDS = 16384 // 24
OF_MEMORY = ("brk", "mmap", "munmap", "mprotect", "madvise", "futex")


def expected_for_first_writes(count: int) -> dict[str, int]:
    doublings = (count // FIRST_RECORDS).bit_length()
    return {"pwrite64": count, "fallocate": doublings, "mremap": doublings}


def of_files(found: Counter[str]) -> dict[str, int]:
    return {call: count for call, count in found.items() if call not in OF_MEMORY}


def test_the_record_of_a_write_is_no_call(tmp_path: Path) -> None:
    """Blocks in no order, so that each write has a record of its own."""
    body = "for number in range(3000): disk.write((1000 + number * 7919 % 200_000) * 4096, block)"
    found = calls(tmp_path, body, prepare='block = b"n" * 4096; disk.write(1 << 20, block)')
    found["close"] -= 1  # of what marks the beginning
    assert of_files(+found) == expected_for_first_writes(3000)


def test_an_overwrite_is_one_call(tmp_path: Path) -> None:
    found = calls(
        tmp_path, "for number in range(3000): disk.write(number % 16 * 4096, block)", prepare="block = b'n' * 4096"
    )
    found["close"] -= 1
    assert of_files(+found) == {"pwrite64": 3000}


def test_a_write_to_a_server_is_a_request_an_answer_and_one_call(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1G").close()
    trace, socket = tmp_path / "trace", short_socket(tmp_path)
    served = [*COMMAND, "serve", f"{tmp_path}/vms/web", "--socket", str(socket), "--json"]
    with subprocess.Popen(["strace", "-f", "-o", trace, *served], stdout=subprocess.PIPE) as traced:
        assert traced.stdout is not None
        try:
            assert traced.stdout.readline()  # it is ready
            with NbdClient.unix(socket, "web") as client:
                client.write(1 << 20, b"n" * 4096)
                before = calls_with_answers(trace, 1)
                for number in range(1000):
                    client.write((1000 + number * 7919 % 200_000) * 4096, b"n" * 4096)
                found = of_files(calls_with_answers(trace, before["sendmsg"] + 1000) - before)
        finally:
            # The server itself, since strace waits for it.
            children = Path(f"/proc/{traced.pid}/task/{traced.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGTERM)
    requests, answers = found.pop("recvfrom"), found.pop("sendmsg")
    assert answers == 1000 and abs(requests - answers) <= 1  # the next request is waited for already, or not yet
    assert found == expected_for_first_writes(1000)


def test_a_flush_of_overwrites_is_one_sync(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()")) == 1


def test_a_flush_of_new_blocks_is_two_syncs(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()", prepare='disk.write(1 << 20, b"n" * 65536)')) == 2


def test_a_flush_of_nothing_is_no_sync(tmp_path: Path) -> None:
    assert syncs(calls(tmp_path, "disk.flush()", prepare="disk.flush()")) == 0


def test_a_snapshot_is_one_flush_and_one_commit(tmp_path: Path) -> None:
    found = calls(tmp_path, 'disk.snapshot("a")', prepare='disk.write(1 << 20, b"n" * 65536)')
    assert syncs(found) == 3


def test_a_fork_and_its_opening_are_one_commit(tmp_path: Path) -> None:
    body = 'store.fork("web@a", names=["b"]); fork = store.open("b"); fork.read(0, 4096)'
    found = calls(tmp_path, body, prepare='disk.snapshot("a"); store._opened.finish_work()')
    assert syncs(found) == 1


PREPARED = """
for name in "abc":
    disk.snapshot(name)
    store.finish_work()
store._opened.wake = lambda: None  # what is made for the head after the next one is not counted
"""


def test_a_snapshot_of_a_head_that_was_prepared_makes_no_file(tmp_path: Path) -> None:
    body = 'disk.write(0, b"n" * 65536); disk.snapshot("d"); disk.write(0, b"o" * 65536)'
    found = calls(tmp_path, body, prepare=PREPARED)
    assert found["openat"] == 0
    assert syncs(found) == 3


@pytest.mark.parametrize("body", ['disk.snapshot("a")', "disk.flush()"])
def test_no_call_grows_with_the_size_of_the_disk(tmp_path: Path, body: str) -> None:
    alone = "store._opened.wake = lambda: None  # the background begins and ends when it does, and is not counted"
    small, large = (calls(tmp_path, body, size=size, prepare=alone) for size in ("1G", "1T"))
    assert of_files(small) == of_files(large)
    for call in OF_MEMORY:  # the allocator asks when it has to
        assert abs(small[call] - large[call]) < 20, (call, small, large)
