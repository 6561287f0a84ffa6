"""Guests of other shapes: several CPUs that write at once, RAM above 4 GiB, another type of machine.

Each page of each snapshot is compared with the RAM of the process while it stood still.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.guests import configuration
from support.lab import LabMachine
from support.linux_guest import LinuxGuest, wait_counts
from support.rounds import rounds

import onionskin
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine import capture, restore
from onionskin.machine.ram import GuestRam, blocks_of, pieces_of, runs_of_extents
from onionskin.machine.running import open_layer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ABOVE = (4 << 30) // PAGE_BYTES


@pytest.fixture(params=[("pc", 2, 5120), ("q35", 2, 301)], ids=["pc-2-5120", "q35-2-301"])
def lab(
    request: pytest.FixtureRequest, linux_guest: LinuxGuest, qemu: list[str], tmp_path: Path
) -> Iterator[LabMachine]:
    """A machine of a type, with so many CPUs and so many MiB of RAM, whose guest writes with all CPUs."""
    machine_type, cpus, memory = request.param
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("root", size="64M").close()
        store.create("data", size="8M").close()
        made = configuration(
            qemu,
            memory,
            machine_type=machine_type,
            cpus=cpus,
            kernel=str(linux_guest.kernel),
            initrd=str(linux_guest.initramfs),
            append="console=ttyS0 quiet panic=-1 counter=64,2000,20",
        )
        with LabMachine.make(store, "lab", ["root", "data"], tmp_path / "lab", qemu, made=made).start() as lab:
            wait_counts(lab.console, 5)
            assert f"cpus {cpus}" in lab.console.text
            yield lab


def private_pages(lab: LabMachine) -> dict[int, bytes]:
    """Return the pages that the process has of its own, and that are not zero. All others are as in its RAM file."""
    ram = lab.running.guest_ram
    assert isinstance(ram, GuestRam)
    found = {}
    for piece in pieces_of(ram._tracker.private(swapped=False)):
        numbers = blocks_of(piece)
        for number, page in zip(numbers.tolist(), ram.read_pages(numbers), strict=True):
            if page.any():
                found[number] = page.tobytes()
    return found


def saved_pages(lab: LabMachine, snapshot: str) -> dict[int, bytes]:
    """Return the pages of a snapshot that are not zero."""
    saved = restore.find_saved(lab.store, lab.running.machine, snapshot)
    found = {}
    with open_layer(lab.store, saved.volume, saved.layer) as view:
        for piece in pieces_of(runs_of_extents(view.extents(), saved.ram_bytes, only_data=True)):
            numbers = blocks_of(piece)
            for number, page in zip(numbers.tolist(), view.read_blocks(numbers), strict=True):
                if page.any():
                    found[number] = page.tobytes()
    return found


def differing(one: dict[int, bytes], other: dict[int, bytes]) -> list[int]:
    return sorted(number for number in one.keys() | other.keys() if one.get(number) != other.get(number))


def test_every_page_of_each_snapshot_is_right_and_a_revert_brings_it_back(lab: LabMachine) -> None:
    kept: list[dict[int, bytes]] = []
    save_state = lab.process.save_state

    def save_and_keep(meanwhile: Callable[[], object]) -> list[str]:
        devices = save_state(meanwhile)
        kept.append(private_pages(lab))
        return devices

    lab.process.save_state = save_and_keep  # type: ignore[method-assign]
    for number in range(rounds(2, 20)):
        assert capture.snapshot(lab.running, f"s{number}").mode == "live"
        assert differing(saved_pages(lab, f"s{number}"), kept.pop()) == []
        wait_counts(lab.console, 2)
    del lab.process.save_state
    first = saved_pages(lab, "s0")
    assert max(first) > ABOVE or lab.running.configuration.memory_bytes < 4 << 30
    for _ in range(rounds(2, 20)):
        lab.process.pause()
        restore.revert(lab.running, "s0")
        told = differing(private_pages(lab), first)
        assert len(told) == 1 and lab.running.generation != lab.running.identity.generation, (
            told
        )  # the page with the id
        lab.process.resume()
        wait_counts(lab.console, 3)
    assert not re.search("Oops|BUG|soft lockup|is wrong", lab.console.text)
