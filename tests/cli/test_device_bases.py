"""A block device as a base, at the command line: what is refused, and that nothing writes over it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from support.loop_devices import MakeDevice, loop_devices

import onionskin
from onionskin.exchange import device_nodes

Run = Callable[..., Result]
MIB = 1 << 20


@pytest.fixture
def device() -> Iterator[MakeDevice]:
    with loop_devices() as make:
        yield make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"\1" * (2 * MIB))
    return path


def test_a_device_is_shown_as_the_base_with_all_of_its_bytes(
    run: Run, vms: Path, disk: Path, device: MakeDevice
) -> None:
    at = device(disk)
    assert run("create", f"{vms}/over", "--base", at).stdout == f"made {vms}/over: 2 MiB over {at}\n"
    assert f"base, raw  2 MiB  2 MiB  -                          {at}" in run("info", f"{vms}/over").stdout
    assert f"{at}  base, 2 MiB" in run("tree", vms).stdout


def test_a_qcow2_image_on_a_device_is_a_base_only_as_raw(
    run: Run, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    disk.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(MIB - 8))
    at = device(disk)
    refused = run("create", f"{tmp_path}/new/web", "--base", at)
    assert refused.exit_code == 6
    assert f"{at} is a qcow2 image, and not a raw disk" in refused.stderr
    assert not (tmp_path / "new").exists()
    assert run("create", f"{tmp_path}/new/web", "--base", at, "--format", "raw").exit_code == 0


def test_a_device_in_use_is_refused_and_leaves_no_store_behind(
    run: Run, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    at = device(disk)
    claim = os.open(at, os.O_RDONLY | os.O_EXCL)
    try:
        refused = run("create", f"{tmp_path}/new/web", "--base", at)
    finally:
        os.close(claim)
    assert refused.exit_code == 5
    assert f"{at} is in use" in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", ["path", "link", "another node", "another device over the file", "the file", "stdout"])
def test_nothing_is_exported_over_a_device_that_is_a_base(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice, way: str
) -> None:
    at = target = device(disk)
    assert run("create", f"{vms}/over", "--base", at).exit_code == 0
    if way == "link":
        target = tmp_path / "link"
        target.symlink_to(at)
    elif way == "another node":
        target = tmp_path / "node"
        os.mknod(target, at.stat().st_mode, at.stat().st_rdev)
    elif way == "another device over the file":
        target = device(disk)
    elif way == "the file":
        target = disk
    if way == "stdout":
        with at.open("r+b") as out:
            command = ["python", "-m", "onionskin", "export", f"{vms}/web", "-"]
            refused = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=300, check=False)
        assert (refused.returncode, b"that volumes stand on" in refused.stderr) == (5, True)
    else:
        done = run("export", f"{vms}/web", target, "--yes")
        assert done.exit_code == (4 if way == "the file" else 5)
        if way != "the file":
            assert "that volumes stand on" in done.stderr
    assert at.read_bytes() == disk.read_bytes() == b"\1" * (2 * MIB)


@pytest.mark.parametrize("way", ["path", "another node"])
def test_nothing_is_exported_over_a_device_that_an_open_volume_of_another_store_reads(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice, way: str
) -> None:
    at = target = device(disk)
    if way == "another node":
        target = tmp_path / "node"
        os.mknod(target, at.stat().st_mode, at.stat().st_rdev)
    with onionskin.Store(tmp_path / "other") as store, store.create("over", base=at):
        refused = run("export", f"{vms}/web", target, "--yes")
        assert refused.exit_code == 5
        assert "is in use, as a base of a volume of some store" in refused.stderr
    assert disk.read_bytes() == b"\1" * (2 * MIB)
    assert run("export", f"{vms}/web", target, "--yes").exit_code == 0


def test_the_devices_that_are_written_with_one_are_what_it_lies_in_and_on_and_has_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk 8:0 with two partitions, of which the second is below the logical volume 253:0."""
    for name, number in {"sda": "8:0", "sda/sda1": "8:1", "sda/sda2": "8:2", "dm-0": "253:0"}.items():
        (tmp_path / name / "slaves").mkdir(parents=True)
        (tmp_path / name / "dev").write_text(f"{number}\n")
        (tmp_path / number).symlink_to(tmp_path / name)
    for name in "sda1", "sda2":
        (tmp_path / "sda" / name / "partition").touch()
    (tmp_path / "dm-0/slaves/sda2").symlink_to("../../sda/sda2")
    monkeypatch.setattr(
        device_nodes, "directory_of", lambda number: f"{tmp_path}/{os.major(number)}:{os.minor(number)}"
    )

    def written_with(major: int, minor: int) -> set[tuple[int, int]]:
        found = device_nodes.devices_written_with(os.makedev(major, minor))
        return {(os.major(one), os.minor(one)) for one in found}

    assert written_with(8, 0) == {(8, 0), (8, 1), (8, 2)}
    assert written_with(8, 1) == {(8, 0), (8, 1)}
    assert written_with(253, 0) == {(8, 0), (8, 2), (253, 0)}
