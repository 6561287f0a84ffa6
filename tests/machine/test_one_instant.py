"""What a guest of Linux holds in its RAM and on its two disks is of one instant, in each snapshot and behind each revert.

The guest (counter.c) writes a count to a file of ext4 on the one disk, behind the answer to that to a sector of the other,
and behind that to a page of its RAM.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import dropwhile
from pathlib import Path

import numpy as np
import pytest
from support.guests import Console
from support.linux_guest import counts, wait_counts
from support.rounds import rounds
from support.vnc import VncClient

import onionskin
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import restore
from onionskin.machine.machine import Machine
from onionskin.machine.running import open_layer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAMP = np.frombuffer(bytes(~byte & 0xFF for byte in b"STAMP OF COUNTER"), np.uint64)
AT_ONCE = 8 << 20


@pytest.fixture(params=["kernel", "elf"])
def fork(request: pytest.FixtureRequest, boot: Callable[..., Machine], qemu: list[str]) -> Iterator[Machine]:
    """A machine that runs, and went on from a snapshot of one that was booted.

    Of an ELF kernel, QEMU makes a ROM, which each reset copies over RAM; and the load of a state resets the machine.
    """
    (made,) = boot(qemu, request.param).fork("up", count=1)
    yield made
    made.stop(force=True)
    made.delete(recursive=True)


def disks_of(machine: Machine) -> list[str]:
    return [disk.volume for disk in machine.info().disks]


def read_all(volume: onionskin.Volume) -> bytes:
    size = volume.size_bytes
    return b"".join(volume.read(at, min(AT_ONCE, size - at)) for at in range(0, size, AT_ONCE))


def check_file_system(image: Path) -> str:
    """Check ext4 as a machine would that starts behind a power cut. Return what is in its file with the counts."""
    replay = subprocess.run(["e2fsck", "-fy", "-E", "journal_only", image], capture_output=True, text=True)
    assert replay.returncode in (0, 1), replay.stdout + replay.stderr
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    return subprocess.run(["debugfs", "-R", "cat /count", image], capture_output=True, text=True, check=True).stdout


def counts_of_disks(root: bytes, data: bytes, scratch: Path) -> tuple[int, int]:
    """Return the last count on each disk. The file of the first has each count in its place."""
    image = scratch / "root.img"
    image.write_bytes(root)
    lines = check_file_system(image).splitlines()
    assert lines == [f"{number:014d}" for number in range(1, len(lines) + 1)]
    return len(lines), int(data[:14])


def test_many_reverts_in_place_put_ram_and_disks_back_and_keep_console_and_vnc(fork: Machine, tmp_path: Path) -> None:
    with Console(fork._directory / "console") as console, VncClient(fork._directory / "vnc") as vnc:
        wait_counts(console, 3)
        vnc.wait_frames(2)
        fork.snapshot("ready")
        hypervisor = fork.status()["pids"]["hypervisor"]
        at, secret = stamp_of(fork, "ready"), secret_of(console.text)
        console.wait(lambda: counts(console.text)[-1] > at + 1)  # lines from before the snapshot may be read behind it
        for number in range(rounds(3, 100)):
            wait_counts(console, 3)
            since = len(console.text)
            fork.revert("ready")
            wait_went_on(console, since, at, secret)
            vnc.wait_frames(2)
            check_instant(*instant_of(fork, f"s{number}", tmp_path))
        assert fork.status()["pids"]["hypervisor"] == hypervisor


def secret_of(text: str) -> str:
    return str(re.findall(r"secret (\w{16})", text)[-1])


def wait_went_on(console: Console, since: int, at: int, secret: str) -> None:
    """Wait until the guest has gone on behind a revert, at the next count and with its secret.

    What it said a moment before, which has higher counts, may come behind the revert. It looks at its memory itself.
    """

    def said() -> list[int]:
        return list(dropwhile(lambda count: count > at + 1, counts(console.text[since:])))

    console.wait(lambda: len(said()) >= 3)
    behind = said()
    assert behind[0] in (at, at + 1), behind
    assert behind == list(range(behind[0], behind[0] + len(behind)))
    text = console.text[since:]
    assert set(re.findall(r"secret (\w{16}) random", text)) == {secret}
    assert "is wrong" not in text and "failed" not in text


def stamp_of(machine: Machine, snapshot: str) -> int:
    """Return the count that is in RAM in a snapshot."""
    saved = restore.find_saved(machine._store, machine._row, snapshot)
    with open_layer(machine._store, saved.volume, saved.layer) as view:
        for at in range(0, saved.ram_bytes, AT_ONCE):
            pages = np.frombuffer(view.read(at, AT_ONCE), np.uint64).reshape(-1, PAGE_BYTES // 8)
            found = np.flatnonzero((pages[:, :2] == STAMP).all(1))
            if len(found):
                return int(pages[found[0], 2])
    raise AssertionError("RAM has no stamp")


def test_two_disks_and_ram_are_of_one_instant_in_each_live_snapshot(booted: Machine, tmp_path: Path) -> None:
    (fork,) = booted.fork("up", count=1)
    try:
        with Console(fork._directory / "console") as console:
            wait_counts(console, 1)
            console.type("x")  # from now on the guest writes without a pause
            wait_counts(console, 3)
            stamps = [0]
            for number in range(rounds(6, 100)):
                wait_counts(console, 1)
                seen = instant_of(fork, f"s{number}", tmp_path)
                check_instant(*seen)
                assert seen[-1] > stamps[-1]
                stamps.append(seen[-1])
    finally:
        fork.stop(force=True)
        fork.delete(recursive=True)


def instant_of(fork: Machine, name: str, scratch: Path) -> tuple[int, int, int]:
    """Take a snapshot of a guest that runs, and return the counts of file, disk and RAM in it."""
    assert fork.snapshot(name).mode == "live"
    images = []
    for disk in disks_of(fork):
        with fork._store.open(disk, snapshot=name) as volume:
            images.append(read_all(volume))
    return (*counts_of_disks(images[0], images[1], scratch), stamp_of(fork, name))


def check_instant(on_file: int, on_disk: int, stamp: int) -> None:
    assert on_file >= on_disk >= stamp >= on_file - 1, (on_file, on_disk, stamp)
