"""Under policy zero, what was in the RAM and in the devices of a machine is nowhere on the medium once it was discarded.

The store lies on a file system in an image, which is read as a whole. One secret is in the RAM of the guest, and one in the
memory of its graphics card, which is saved with the state of the devices.
"""

import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Mount, image_of
from support.gap import Gap
from support.guests import MIB, Console, configuration, end_machines, until
from support.rounds import ALL

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine.machine import Machine
from onionskin.machine.record import Record

pytestmark = pytest.mark.slow  # each starts several processes
PAGE = 4096
VGA_MIB = 4  # nothing else of the hypervisor has this size
IN_A_SNAPSHOT = ["UnsavedRam.save after", "StateFile.save after", "MachineCut.commit before"]


class Secret:
    """Random pages, and where they are."""

    def __init__(self) -> None:
        self.bytes = secrets.token_bytes(8 * PAGE)

    def is_on(self, image: Path) -> bool:
        """Whether a part of it is on a medium."""
        os.sync()
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as medium:
            return any(medium.find(self.bytes[at : at + 64]) >= 0 for at in range(0, len(self.bytes), PAGE // 2))


@pytest.fixture(params=["ext4", "xfs"])
def medium(request: pytest.FixtureRequest) -> Path:
    """A directory on a file system of its own."""
    mount: Mount = request.getfixturevalue(f"{request.param}_mount")
    return mount(320 * MIB)


@pytest.fixture
def lab(medium: Path, tick_disk: Path, qemu: list[str], gap: Gap) -> Iterator[Machine]:
    """A machine on that medium, which runs and has a snapshot `before`."""
    with onionskin.Store(medium / "vms") as store:
        store.create("web", base=tick_disk).close()
        one = configuration(qemu, qemu_args=("-device", f"VGA,vgamem_mb={VGA_MIB}"))
        machine = store.create_machine(
            "lab", disks=["web"], memory="16M", program=one.program, qemu_args=one.qemu_args, wipe="zero"
        )
        machine.start()
        try:
            with Console(machine._directory / "console") as screen:
                screen.wait_ticks()
            machine.snapshot("before")
            yield machine
        finally:
            end_machines(store)


def put_into(machine: Machine) -> tuple[Secret, Secret]:
    """Write a secret to the RAM of a guest that runs, and one to the memory of its graphics card."""
    record = Record.read(machine._directory)
    assert record is not None and record.hypervisor is not None
    found = [line.split() for line in Path(f"/proc/{record.hypervisor.pid}/maps").read_text().splitlines()]
    lengths = {line[0]: [int(end, 16) for end in line[0].split("-")] for line in found}
    (ram,) = (lengths[line[0]] for line in found if line[5:] == [record.ram_file])
    (vga,) = (
        (start, end)
        for line in found
        if len(line) == 5
        for start, end in [lengths[line[0]]]
        if end - start == VGA_MIB * MIB
    )
    of_ram, of_vga = Secret(), Secret()
    with Path(f"/proc/{record.hypervisor.pid}/mem").open("r+b", buffering=0) as memory:
        for secret, at in ((of_ram, ram[0] + 2000 * PAGE), (of_vga, vga[0] + 3 * MIB)):
            memory.seek(at)
            memory.write(secret.bytes)
    return of_ram, of_vga


def check_on(directory: Path, both: tuple[Secret, Secret], *, expected: bool) -> None:
    assert [secret.is_on(image_of(directory)) for secret in both] == [expected, expected]


def ram_files(medium: Path) -> list[str]:
    return [path.name for path in (medium / "vms/ram").iterdir()] if (medium / "vms/ram").exists() else []


def test_a_secret_that_was_discarded_is_nowhere_on_the_medium(lab: Machine, medium: Path) -> None:
    both = put_into(lab)
    lab.snapshot("secret")
    (fork,) = lab.fork("secret", count=1)
    fork.snapshot("of-a-fork")
    check_on(medium, both, expected=True)
    fork.stop(force=True)
    fork.delete(recursive=True)
    lab.revert("before")
    lab.discard("secret")
    check_on(medium, both, expected=False)
    with Console(lab._directory / "console") as screen:
        screen.wait_ticks()


def test_a_secret_of_a_machine_that_was_deleted_is_nowhere_on_the_medium(lab: Machine, medium: Path) -> None:
    both = put_into(lab)
    lab.snapshot("secret")
    until(lambda: len(ram_files(medium)) > 0)
    check_on(medium, both, expected=True)
    lab.stop(force=True)
    lab.delete(recursive=True)
    check_on(medium, both, expected=False)
    assert ram_files(medium) == []


@pytest.mark.parametrize("where", IN_A_SNAPSHOT if ALL else IN_A_SNAPSHOT[1:2])
def test_a_secret_in_a_snapshot_that_was_killed_is_nowhere_on_the_medium(
    lab: Machine, medium: Path, gap: Gap, where: str
) -> None:
    of_ram, of_vga = put_into(lab)
    gap.arm(where, "supervisor")
    with pytest.raises((OnionskinError, OSError)):
        lab.snapshot("secret")
    assert gap.disarm()
    assert of_ram.is_on(image_of(medium))
    lab.revert("before")
    check_on(medium, (of_ram, of_vga), expected=False)


def test_a_secret_in_a_draft_of_a_ram_file_is_nowhere_on_the_medium(lab: Machine, medium: Path, gap: Gap) -> None:
    both = put_into(lab)
    until(lambda: any(not name.endswith(".new") for name in ram_files(medium)))  # that of `before`
    gap.arm("fill_file after", "supervisor")
    lab.snapshot("secret")
    until(lambda: gap.is_met)
    assert any(name.endswith(".new") for name in ram_files(medium))
    check_on(medium, both, expected=True)
    lab.revert("before")
    lab.discard("secret")
    check_on(medium, both, expected=False)
