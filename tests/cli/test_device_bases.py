"""A block device as a base, at the command line: what is refused, and that nothing writes over it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from support.loop_devices import MakeDevice, loop_devices

import onionskin
from onionskin.cli.disk_output import stdout_for_a_disk
from onionskin.exchange import device_nodes
from onionskin.exchange.block_devices import BlockDevice
from onionskin.images import export_to_device
from onionskin.storage import locks
from onionskin.storage.locks import written_over

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


def test_a_volume_over_a_device_is_compared_by_what_the_device_holds(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    at, zeros = device(disk), tmp_path / "zeros"
    zeros.write_bytes(bytes(2 * MIB))
    assert run("create", f"{vms}/over", "--base", at).exit_code == 0
    assert run("create", f"{vms}/empty", "--size", 2 * MIB).exit_code == 0
    for other in zeros, f"{vms}/empty":
        differs = run("compare", f"{vms}/over", other)
        assert (differs.exit_code, differs.stdout) == (1, "different from byte 0 on\n")
    for other in disk, at:
        assert run("compare", f"{vms}/over", other).stdout == "the same\n"


def test_a_qcow2_image_on_a_device_is_imported_and_compared(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, image], check=True)
    os.truncate(image, 4 * MIB)
    at = device(image)
    assert run("import", at, f"{vms}/web2").exit_code == 0
    for other in at, device(disk):
        for one in f"{vms}/web2", image:
            assert run("compare", one, other).stdout == "the same\n"
    os.truncate(image, MIB)
    assert run("import", device(image), f"{vms}/short").exit_code == 6


def another_node(device: Path, path: Path) -> Path:
    os.mknod(path, device.stat().st_mode, device.stat().st_rdev)
    return path


def export_to_stdout(vms: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    with target.open("r+b") as out:
        command = [sys.executable, "-m", "onionskin", "export", f"{vms}/web", "-"]
        return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300, check=False)


@pytest.mark.parametrize("way", ["path", "link", "another node"])
def test_nothing_is_exported_over_a_device_that_is_a_base(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice, way: str
) -> None:
    at = target = device(disk)
    assert run("create", f"{vms}/over", "--base", at).exit_code == 0
    disk.unlink()  # so that it is the device, and not the file below it, that is found to be a base
    if way == "link":
        target = tmp_path / "link"
        target.symlink_to(at)
    elif way == "another node":
        target = another_node(at, tmp_path / "node")
    refused = run("export", f"{vms}/web", target, "--yes")
    assert refused.exit_code == 5
    assert f"{target} is a base that volumes stand on" in refused.stderr
    to_stdout = export_to_stdout(vms, target)
    assert (to_stdout.returncode, "stdout is a base that volumes stand on" in to_stdout.stderr) == (5, True)
    assert at.read_bytes() == b"\1" * (2 * MIB)


def test_nothing_is_exported_over_the_file_below_a_device_that_is_a_base(
    run: Run, vms: Path, disk: Path, device: MakeDevice
) -> None:
    assert run("create", f"{vms}/over", "--base", device(disk)).exit_code == 0
    other = device(disk)
    refused = run("export", f"{vms}/web", other, "--yes")
    assert refused.exit_code == 5
    assert f"{other} stands on {disk}, a base that volumes stand on" in refused.stderr
    with onionskin.Store(vms) as store, store.open("web", mode="r") as web:
        for target in disk, other:
            to_stdout = export_to_stdout(vms, target)
            assert (to_stdout.returncode, "base that volumes stand on" in to_stdout.stderr) == (5, True)
        with pytest.raises(onionskin.StateError, match="is a base that volumes stand on"):
            web.export(disk)
    assert disk.read_bytes() == b"\1" * (2 * MIB)


@pytest.mark.parametrize("way", ["path", "another node"])
def test_nothing_is_exported_over_a_device_that_an_open_volume_of_another_store_reads(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice, way: str
) -> None:
    at = base = device(disk)
    if way == "another node":
        base = another_node(at, tmp_path / "node")
    with onionskin.Store(tmp_path / "other") as store, store.create("over", base=base):
        refused = run("export", f"{vms}/web", at, "--yes")
        assert refused.exit_code == 5
        assert f"{at} is in use, as a base of a volume of some store" in refused.stderr
        to_stdout = export_to_stdout(vms, at)
        assert (to_stdout.returncode, "stdout is in use, as a base" in to_stdout.stderr) == (5, True)
    assert disk.read_bytes() == b"\1" * (2 * MIB)
    assert run("export", f"{vms}/web", at, "--yes").exit_code == 0


def test_a_device_is_not_opened_as_a_base_while_an_export_writes_it(
    vms: Path, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    at, refused = device(disk), []
    with onionskin.Store(tmp_path / "other") as other, onionskin.Store(vms) as store, store.open("web") as web:
        other.create("over", base=at).close()

        def try_to_open(done: int, total: int) -> None:
            with pytest.raises(onionskin.StateError, match="an export is writing the base"):
                other.open("over")
            refused.append(done)

        with BlockDevice(another_node(at, tmp_path / "node")) as target:
            export_to_device(web, target, progress=try_to_open)
        with pytest.raises(onionskin.ChainError, match="has changed"):
            other.open("over")
    assert refused == [MIB]


@pytest.mark.parametrize("way", ["path", "stdout"])
def test_nothing_is_exported_over_a_base_through_devices_over_devices(
    run: Run, vms: Path, disk: Path, device: MakeDevice, way: str
) -> None:
    lower = device(disk)
    upper, before = device(lower), disk.read_bytes()

    def refused(target: Path) -> bool:
        if way == "stdout":
            done = export_to_stdout(vms, target)
            return done.returncode == 5 and "base" in done.stderr
        tried = run("export", f"{vms}/web", target, "--yes")
        return tried.exit_code == 5 and "base" in tried.stderr

    assert run("create", f"{vms}/over", "--base", disk).exit_code == 0
    assert [refused(lower), refused(upper)] == [True, True]
    assert run("delete", f"{vms}/over").exit_code == 0
    assert run("create", f"{vms}/over", "--base", upper).exit_code == 0
    assert [refused(lower), refused(upper), refused(device(disk))] == [True, True, True]
    assert export_to_stdout(vms, disk).returncode == 5
    assert disk.read_bytes() == before


def test_the_file_of_a_device_is_known_when_it_has_another_name(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    at, other = device(disk), tmp_path / "other"
    os.link(disk, other)
    disk.unlink()
    assert run("create", f"{vms}/over", "--base", other).exit_code == 0
    refused = run("export", f"{vms}/web", at, "--yes")
    assert (refused.exit_code, "a base that volumes stand on" in refused.stderr) == (5, True)
    assert other.read_bytes() == b"\1" * (2 * MIB)


def test_nothing_is_exported_over_what_a_device_stands_on_that_an_open_volume_of_another_store_reads(
    run: Run, vms: Path, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    lower, beside = device(disk), device(disk)
    upper = device(lower)
    with onionskin.Store(tmp_path / "other") as store, store.create("over", base=upper):
        for target in lower, beside:
            assert "is in use, as a base of a volume" in run("export", f"{vms}/web", target, "--yes").stderr
        for target in lower, beside, disk:
            assert "stdout is in use, as a base of a volume" in export_to_stdout(vms, target).stderr
    assert disk.read_bytes() == b"\1" * (2 * MIB)
    assert run("export", f"{vms}/web", beside, "--yes").exit_code == 0


@pytest.mark.parametrize("way", ["path", "stdout", "stdout is the file"])
def test_what_shares_bytes_with_what_an_export_writes_is_not_opened_as_a_base(
    vms: Path, tmp_path: Path, disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    lower, beside = device(disk), device(disk)
    upper = device(lower)
    bases = [lower, upper, beside] if way == "stdout is the file" else [disk, lower, upper, beside]

    with onionskin.Store(tmp_path / "other") as other, onionskin.Store(vms) as store, store.open("web") as web:

        def none_can_be_made(done: int = 0, total: int = 0) -> None:
            for base in bases:
                with pytest.raises(onionskin.StateError, match=r"an export is writing the base|in use"):
                    other.create("over", base=base)

        if way == "path":
            with BlockDevice(beside) as target:
                export_to_device(web, target, progress=none_can_be_made)
        else:
            with (beside if way == "stdout" else disk).open("r+") as out:
                monkeypatch.setattr(sys, "stdout", out)
                with stdout_for_a_disk(store):
                    none_can_be_made()
        for base in bases:
            other.create(base.name, base=base).close()


def test_a_file_that_becomes_a_base_just_before_an_export_over_a_device_on_it_is_kept(
    vms: Path, disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, mark = device(disk), locks._opened_to_mark
    with onionskin.Store(vms) as store, store.open("web") as web, BlockDevice(target) as opened:

        def make_base_first(descriptor: int) -> list[int]:
            store.create("over", base=disk).close()
            return mark(descriptor)

        monkeypatch.setattr(locks, "_opened_to_mark", make_base_first)
        with pytest.raises(onionskin.StateError, match="a base that volumes stand on"):
            export_to_device(web, opened)
    assert disk.read_bytes() == b"\1" * (2 * MIB)


def test_two_exports_to_one_file_by_two_devices_do_not_take_each_other_for_volumes(
    disk: Path, device: MakeDevice
) -> None:
    """As those to two partitions of a disk, or to two logical volumes."""
    with (
        device(disk).open("rb") as one,
        device(disk).open("rb") as other,
        written_over(one.fileno(), "one"),
        written_over(other.fileno(), "other"),
    ):
        pass


def test_a_device_that_stdout_writes_is_claimed_meanwhile(
    vms: Path, disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = device(disk)
    with onionskin.Store(vms) as store, target.open("r+") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with stdout_for_a_disk(store), pytest.raises(OSError, match="busy"):
            os.open(target, os.O_RDONLY | os.O_EXCL)
    os.close(os.open(target, os.O_RDONLY | os.O_EXCL))


def to_device(target: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    with target.open("r+b") as out:
        command = [sys.executable, "-m", "onionskin", *map(str, words)]
        return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300, check=False)


def test_a_stdout_that_is_a_device_too_small_is_refused_before_anything_is_written(
    vms: Path, tmp_path: Path, device: MakeDevice
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"\2" * (MIB // 2))
    target = device(small)
    for words in ("export", f"{vms}/web", "-"), ("read", f"{vms}/web", 0, MIB):
        done = to_device(target, *words)
        assert (done.returncode, "stdout: the device has 524288 bytes" in done.stderr) == (7, True)
    assert small.read_bytes() == b"\2" * (MIB // 2)


def test_what_is_read_to_a_device_is_an_error_where_it_does_not_arrive(
    run: Run, vms: Path, tmp_path: Path, device: MakeDevice
) -> None:
    """A device takes writes into memory, and says when they are synced that it has no room."""
    assert run("write", f"{vms}/web", 0, input=os.urandom(MIB)).exit_code == 0
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full], check=True)
    try:
        with loop_devices() as make:
            with (full / "file").open("wb") as file:
                file.truncate(MIB)
            done = to_device(make(full / "file"), "read", f"{vms}/web", 0, MIB)
            assert done.returncode in (1, 7)  # the kernel says EIO or ENOSPC
            assert "stdout" in done.stderr
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)


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
        found = device_nodes.written_with(os.makedev(major, minor)).devices
        return {(os.major(one), os.minor(one)) for one in found}

    assert written_with(8, 0) == {(8, 0), (8, 1), (8, 2)}
    assert written_with(8, 1) == {(8, 0), (8, 1)}
    assert written_with(253, 0) == {(8, 0), (8, 2), (253, 0)}


def test_a_device_becomes_no_base_while_stdout_writes_it(
    vms: Path, disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = device(disk)
    with onionskin.Store(vms) as store, target.open("r+") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with stdout_for_a_disk(store), pytest.raises(onionskin.StateError, match="an export is writing the base"):
            store.create("over", base=target)
        store.create("over", base=target).close()
        with pytest.raises(onionskin.StateError, match="stdout is a base"), stdout_for_a_disk(store):
            pass
