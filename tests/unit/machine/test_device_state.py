"""The file into which a hypervisor writes the state of the devices."""

import subprocess
from pathlib import Path

from onionskin.machine.device_state import empty_file


def test_the_empty_file_is_as_qemu_makes_it(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(empty_file())
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", ours], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=16k", theirs, "1M"], check=True)
    header, made = 112, theirs.read_bytes().ljust(len(empty_file()), b"\0")
    assert (made[:header], made[16384:]) == (empty_file()[:header], empty_file()[16384:])  # between: names of features
