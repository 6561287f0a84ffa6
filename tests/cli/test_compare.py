"""Two disks are the same or not, whatever they are kept in; an error is never taken for a difference."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.exchange import comparison

Run = Callable[..., Result]


@pytest.fixture
def raw(run: Run, vms: Path, tmp_path: Path) -> Path:
    """The disk as an image."""
    assert run("export", f"{vms}/web@clean", tmp_path / "disk.raw").exit_code == 0
    return tmp_path / "disk.raw"


def judged(run: Run, *arguments: object) -> tuple[int, int | None]:
    result = run("compare", "--json", *arguments)
    return result.exit_code, json.loads(result.stdout)["first_difference"]


def test_a_snapshot_is_the_same_as_its_head_until_that_is_written_to(run: Run, vms: Path) -> None:
    assert judged(run, f"{vms}/web", f"{vms}/web@clean") == (0, None)
    assert run("write", f"{vms}/web", 700_001, input=b"x").exit_code == 0
    assert judged(run, f"{vms}/web", f"{vms}/web@clean") == (1, 700_001)
    shown = run("compare", f"{vms}/web", f"{vms}/web@clean")
    assert (shown.exit_code, shown.stdout) == (1, "different from byte 700001 on\n")


def test_a_base_counts_with_what_is_over_it(run: Run, vms: Path, raw: Path) -> None:
    assert run("create", f"{vms}/over", "--base", raw).exit_code == 0
    assert judged(run, f"{vms}/over", f"{vms}/web") == (0, None)
    assert run("zero", f"{vms}/over", 0, 5).exit_code == 0
    assert judged(run, f"{vms}/over", f"{vms}/web") == (1, 0)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhdx"])
def test_an_image_is_compared_in_its_own_format(run: Run, vms: Path, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"image,with a comma.{kind}"
    assert run("export", f"{vms}/web", image, "--format", kind).exit_code == 0
    assert judged(run, image, f"{vms}/web") == (0, None)
    assert run("write", f"{vms}/web", 512 * 1024, input=b"x").exit_code == 0
    assert judged(run, f"{vms}/web", image) == (1, 512 * 1024)


def test_two_images_are_compared(run: Run, raw: Path, tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "disk.qcow2"], check=True)
    assert judged(run, raw, tmp_path / "disk.qcow2") == (0, None)
    assert judged(run, raw, raw) == (0, None)
    assert judged(run, raw, tmp_path / "disk.qcow2", "--format", "raw")[0] == 1


def test_a_shorter_disk_is_zero_behind_its_end_unless_that_is_strict(run: Run, vms: Path, raw: Path) -> None:
    assert run("resize", f"{vms}/web", "2M").exit_code == 0
    assert judged(run, raw, f"{vms}/web") == (0, None)
    assert judged(run, raw, f"{vms}/web", "--strict") == (1, 1 << 20)
    assert "has 1048576 bytes" in run("compare", raw, f"{vms}/web").stdout
    assert run("write", f"{vms}/web", "1500K", input=b"x").exit_code == 0
    assert judged(run, raw, f"{vms}/web") == (1, 1500 << 10)


def test_holes_of_both_are_not_read(run: Run, vms: Path) -> None:
    for name in ("a", "b"):
        assert run("create", f"{vms}/{name}", "--size", "32T").exit_code == 0
        assert run("write", f"{vms}/{name}", "31T", input=b"far").exit_code == 0
    assert judged(run, f"{vms}/a", f"{vms}/b") == (0, None)


def test_holes_of_a_base_are_not_read(run: Run, vms: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with open(base, "wb") as file:
        file.write(b"b" * 4096)
        file.truncate(1 << 40)
    for name in ("one", "two"):
        assert run("create", f"{vms}/{name}", "--base", base).exit_code == 0
    assert run("write", f"{vms}/two", 1 << 39, input=b"x").exit_code == 0
    assert judged(run, f"{vms}/one", f"{vms}/one") == (0, None)
    assert judged(run, f"{vms}/one", base) == (0, None)
    assert judged(run, f"{vms}/one", f"{vms}/two") == (1, 1 << 39)


@pytest.mark.parametrize(("side", "status"), [("web@nope", 3), ("nope", 3)])
def test_an_error_is_no_difference(run: Run, vms: Path, side: str, status: int) -> None:
    assert run("compare", f"{vms}/{side}", f"{vms}/web").exit_code == status


def test_an_error_without_a_status_of_its_own_is_no_difference(
    run: Run, vms: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error", str(raw))

    monkeypatch.setattr("onionskin.exchange.comparison.first_difference", fail)
    refused = run("compare", raw, f"{vms}/web")
    assert refused.exit_code == 2
    assert "Input/output error" in refused.stderr


def test_an_image_that_reads_other_files_is_not_compared(run: Run, vms: Path, raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, overlay], check=True)
    refused = run("compare", overlay, f"{vms}/web")
    assert refused.exit_code == 6
    assert "reads from another file" in refused.stderr


@pytest.mark.parametrize("what", ["base", "image"])
def test_what_changed_while_it_was_compared_is_neither_the_same_nor_different(
    run: Run, vms: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert run("create", f"{vms}/over", "--base", raw).exit_code == 0
    real = comparison.first_difference

    def write_first(*arguments: Any) -> int | None:
        found = real(*arguments)
        raw.write_bytes(b"later" + raw.read_bytes()[5:])
        os.utime(raw, ns=(1, 1))
        return found

    monkeypatch.setattr(comparison, "first_difference", write_first)
    failed = run("compare", f"{vms}/over" if what == "base" else raw, f"{vms}/web")
    assert (failed.exit_code, failed.stdout) == (6, "")
    assert "changed" in failed.stderr


def test_a_path_that_cannot_be_looked_at_is_no_difference(run: Run, vms: Path) -> None:
    failed = run("compare", "a" * 300, f"{vms}/web")
    assert failed.exit_code == 2
    assert "File name too long" in failed.stderr


def test_what_is_no_file_and_no_device_with_blocks_is_not_taken_for_a_volume(
    run: Run, vms: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in "/dev/null", tmp_path / "fifo":
        refused = run("compare", f"{vms}/web", path)
        assert refused.exit_code == 2
        assert f"{path} is neither a file nor a block device, and is not compared" in refused.stderr
