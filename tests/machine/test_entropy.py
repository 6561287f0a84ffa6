"""What forks of a Linux guest draw, and a guest that is put back: random numbers of their own, or a warning.

Debian's own cloud kernel is one; those of packages in the directory ONIONSKIN_KERNELS are others (tools/fetch_kernel.sh).
"""

import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from support.guests import QEMUS
from support.linux_guest import kernel_package

import onionskin
from onionskin.base.linux_kernel import release_of_file
from onionskin.guests import counting, packages
from onionskin.guests.console import Console
from onionskin.guests.counting import Tick, ticks
from onionskin.machine.entropy import doubt_about
from onionskin.machine.machine import Machine
from onionskin.measure.demo import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SECONDS = 300.0  # of a busy machine
QEMU = QEMUS[-1]  # the newest: without KVM, QEMU 7.2 goes wrong in most boots of Linux 6.12 on a busy host
OTHERS = sorted(Path(os.environ["ONIONSKIN_KERNELS"]).glob("*.deb")) if "ONIONSKIN_KERNELS" in os.environ else []


class Guest(NamedTuple):
    machine: Machine
    kernel: str


@pytest.fixture(scope="module", params=[None, *OTHERS], ids=lambda deb: deb.name.split("_")[0] if deb else "debian")
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A machine that was booted, taken as `up` while it ran, and is off."""
    directory = tmp_path_factory.mktemp("guest")
    for name in ("packages", "download"):
        (directory / name).mkdir()
    package = request.param or kernel_package(directory / "download")
    (directory / "packages" / package.name).symlink_to(package)
    kernel = packages.find_kernel(directory / "packages")
    busybox, mkfs = packages.find_busybox(None), program("mkfs.ext4")
    assert kernel is not None and busybox is not None and mkfs is not None
    (directory / "vmlinuz").write_bytes(kernel.image)
    counting.build_initramfs(directory / "initramfs", kernel, busybox, filled_bytes=counting._PIECE_BYTES)
    counting.build_disk(directory / "first.raw", mkfs, 16 << 20, busybox, first=True)
    with onionskin.Store(directory / "vms") as store:
        store.create("disk", base=directory / "first.raw").close()
        machine = store.create_machine(
            "lab",
            disks=["disk"],
            memory="256M",
            program=QEMU[0],
            qemu_args=QEMU[1:],
            kernel=str(directory / "vmlinuz"),
            initrd=str(directory / "initramfs"),
            append=counting.APPEND,
            agent=False,
        )
        machine.start(paused=True)
        try:
            with screen_of(machine) as screen:
                machine.resume()
                first_ticks(screen, 20)
                machine.snapshot("up")
        finally:
            machine.stop(force=True)
        yield Guest(machine, kernel.release)


def screen_of(machine: Machine) -> Console:
    return Console(machine.console(), machine.name)


def first_ticks(screen: Console, count: int) -> list[Tick]:
    return screen.wait(lambda text: ticks(text) if len(ticks(text)) >= count else None, SECONDS, "ticks")


def fork(machine: Machine) -> tuple[Machine, list[str]]:
    """Fork a machine and leave it off. Returns it, and what was warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        (made,) = machine.fork("up", count=1, start=False)
    return made, [str(one.message) for one in warned if one.category is RuntimeWarning]


def test_forks_draw_random_numbers_of_their_own_from_the_first_tick_or_it_is_warned(guest: Guest) -> None:
    heard, said = [], []
    for _ in range(2):
        made, warned = fork(guest.machine)
        said += warned
        try:
            made.start(paused=True)
            with screen_of(made) as screen:
                made.resume()
                heard.append(first_ticks(screen, 3))
        finally:
            made.stop(force=True)
            made.delete()
    one, other = heard
    assert one[0].count == other[0].count and one[0].secret == other[0].secret
    if doubt_about(guest.kernel):
        assert len(said) == 2 and all(f"Linux {guest.kernel}" in line for line in said)
    else:
        assert said == []
        # The number of the first tick may have been drawn before the snapshot, and said behind it.
        assert not {tick.random for tick in one[1:]} & {tick.random for tick in other[1:]}


def test_a_guest_that_is_put_back_in_place_draws_others_than_the_first_time(guest: Guest) -> None:
    machine = guest.machine
    drawn, generations = [], [machine.status().get("generation")]
    machine.revert("up")
    try:
        with screen_of(machine) as screen:
            for _ in range(2):
                first_ticks(screen, 5)
                machine.revert("up")
                generations.append(machine.status()["generation"])
                back = screen.wait(_after_going_back, SECONDS, "a tick of the snapshot")
                screen.forget_before(f"tick {back.count:09d}")
                drawn.append(first_ticks(screen, 2)[1])  # the first may have been drawn before the snapshot
    finally:
        machine.stop(force=True)
    assert len(set(generations)) == 3
    assert drawn[0].count == drawn[1].count
    if not doubt_about(guest.kernel):
        assert drawn[0].random != drawn[1].random


def _after_going_back(text: str) -> Tick | None:
    found = ticks(text)
    return next((now for before, now in pairwise(found) if now.count <= before.count), None)


def test_the_release_of_the_kernel_is_kept_with_the_snapshot_and_not_read_again(guest: Guest) -> None:
    kernel = Path(guest.machine.configuration.kernel or "")
    image = kernel.read_bytes()
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(8) + (0x10).to_bytes(2, "little") + b"9.9.9 another\0")
    assert release_of_file(kernel) == "9.9.9"
    try:
        made, warned = fork(guest.machine)
        made.delete()
    finally:
        kernel.write_bytes(image)
    assert bool(warned) == bool(doubt_about(guest.kernel))
