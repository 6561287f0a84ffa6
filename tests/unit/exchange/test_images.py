"""Disk images in and out: holes stay holes, and no image reads a file that nobody named."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from support.loop_devices import loop_devices

from onionskin.base import files
from onionskin.catalog import LayerRow, VolumeRow
from onionskin.errors import FormatError, OnionskinError, VolumeExistsError, VolumeNotFoundError
from onionskin.exchange import qemu_img
from onionskin.images import detect_format, export_image, import_image
from onionskin.store import Store

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def qemu(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def contents(store: Store, name: str) -> bytes:
    with store.open(name) as volume:
        return volume.read(0, volume.size_bytes)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An image with data, written zeros, and holes."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(16 << 20)
        file.seek(3 * BLOCK)
        file.write(b"data" * BLOCK)
        file.seek(9 << 20)
        file.write(bytes(2 * BLOCK) + os.urandom(BLOCK))
    return path


def test_an_image_reads_the_same_as_the_volume_made_from_it(store: Store, raw: Path) -> None:
    assert import_image(store, raw, "web") == 16 << 20
    assert contents(store, "web") == raw.read_bytes()


def test_holes_and_zero_blocks_are_not_stored(store: Store, raw: Path) -> None:
    import_image(store, raw, "web")
    with store.open("web") as volume:
        extents = [(int(o), int(n)) for o, n, state in volume.extents() if state == 1]
    assert extents == [(3 * BLOCK, 4 * BLOCK), ((9 << 20) + 2 * BLOCK, BLOCK)]


def test_an_image_that_ends_inside_a_block_keeps_its_size(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(os.urandom(2 * BLOCK + 512))
    import_image(store, path, "web")
    assert contents(store, "web") == path.read_bytes()


def test_an_image_is_given_by_its_path_or_open_and_the_parameter_is_called_path(store: Store, raw: Path) -> None:
    import_image(store, path=raw, name="by-path")
    with open(raw, "rb") as file:
        import_image(store, path=file, name="open")
    assert contents(store, "by-path") == contents(store, "open") == raw.read_bytes()


def test_data_ranges_follow_the_holes_of_a_file(raw: Path) -> None:
    with open(raw, "rb") as file:
        ranges = list(files.data_ranges(file.fileno(), 0, 16 << 20))
    found = np.zeros(16 << 20, dtype=bool)
    for first, last in ranges:
        found[first:last] = True
    assert found[3 * BLOCK : 7 * BLOCK].all()
    assert found.sum() < 1 << 20
    with open(raw, "rb") as file:
        assert list(files.data_ranges(file.fileno(), 4 * BLOCK, 5 * BLOCK)) == [(4 * BLOCK, 5 * BLOCK)]


def test_progress_ends_at_all_that_there_is(store: Store, raw: Path) -> None:
    seen: list[tuple[int, int]] = []
    import_image(store, raw, "web", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx", "vdi"])
def test_formats_are_told_by_their_first_bytes(raw: Path, tmp_path: Path, kind: str) -> None:
    qemu("convert", "-f", "raw", "-O", kind, raw, tmp_path / "disk")
    assert detect_format(tmp_path / "disk") == kind
    assert detect_format(raw) == "raw"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.raw"
    path.write_bytes(b"secret! " * 512)
    return path


def test_an_image_that_reads_from_another_file_is_refused(store: Store, tmp_path: Path, secret: Path) -> None:
    overlay = tmp_path / "overlay.raw"  # as a guest would write it over its own raw disk
    qemu("create", "-f", "qcow2", "-F", "raw", "-b", secret, overlay)
    with pytest.raises(FormatError, match="reads from another file"):
        import_image(store, overlay, "web")
    assert store.volumes() == []


def test_naming_the_format_vouches_for_a_backing_file(store: Store, tmp_path: Path, secret: Path) -> None:
    qemu("create", "-f", "qcow2", "-F", "raw", "-b", secret, tmp_path / "overlay")
    import_image(store, tmp_path / "overlay", "web", format="qcow2")
    assert contents(store, "web") == secret.read_bytes()


def test_a_vmdk_descriptor_of_another_file_is_refused(store: Store, tmp_path: Path, raw: Path) -> None:
    qemu("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, tmp_path / "disk.vmdk")
    with pytest.raises(FormatError, match=r"disk-flat\.vmdk"):
        import_image(store, tmp_path / "disk.vmdk", "web")


def test_a_qcow2_with_a_data_file_is_refused(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    qemu("create", "-f", "qcow2", "-o", f"data_file={outside}", tmp_path / "disk", "1M")
    with pytest.raises(FormatError, match="outside"):
        import_image(store, tmp_path / "disk", "web")


def test_raw_means_raw_when_it_is_said(store: Store, tmp_path: Path, secret: Path) -> None:
    overlay = tmp_path / "overlay"
    qemu("create", "-f", "qcow2", "-F", "raw", "-b", secret, overlay)
    import_image(store, overlay, "web", format="raw")
    assert contents(store, "web") == overlay.read_bytes()


def test_a_name_with_a_colon_is_a_file_and_no_protocol(store: Store, raw: Path, tmp_path: Path) -> None:
    qemu("convert", "-O", "qcow2", raw, tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "nbd:localhost:1")
    import_image(store, tmp_path / "nbd:localhost:1", "web")
    assert contents(store, "web") == raw.read_bytes()


def test_a_damaged_image_leaves_no_volume_and_no_file(store: Store, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"QFI\xfb" + b"\xff" * 600)
    before = sorted(path.name for path in store.path.iterdir())
    with pytest.raises(FormatError, match="qemu-img info failed"):
        import_image(store, broken, "web")
    assert store.volumes() == []
    assert sorted(path.name for path in store.path.iterdir()) == before


def test_an_import_that_is_interrupted_leaves_no_volume(store: Store, raw: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_image(store, raw, "web", progress=stop)
    assert store.volumes() == []


KILLED = """
import os, signal, sys
from onionskin import Store, images

def kill(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.Signals[sys.argv[3]])

with Store(sys.argv[1]) as store:
    images.import_image(store, sys.argv[2], "web", progress=kill)
"""


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_killed_import_leaves_no_volume(store: Store, raw: Path, tmp_path: Path, kind: str, signal_name: str) -> None:
    qemu("convert", "-O", kind, raw, tmp_path / "image")
    ended = subprocess.run([sys.executable, "-c", KILLED, store.path, tmp_path / "image", signal_name])
    assert ended.returncode == -signal.Signals[signal_name]
    assert store.volumes() == []
    assert [node for node in store.tree() if node.kind == "head"] == []
    with pytest.raises(VolumeNotFoundError):
        store.open("web")
    import_image(store, raw, "web")  # which drops what is left, too
    assert contents(store, "web") == raw.read_bytes()
    assert len(store._opened.catalog.rows(VolumeRow)) == len(store._opened.catalog.rows(LayerRow)) == 1
    assert store.check() == []


def test_a_volume_that_takes_the_name_during_an_import_is_kept_and_the_import_is_not(store: Store, raw: Path) -> None:
    def take(done: int, total: int) -> None:
        if not store.volumes():
            with store.create("web", size=BLOCK) as volume:
                volume.write(0, b"precious")
                volume.snapshot("keep")

    with pytest.raises(VolumeExistsError):
        import_image(store, raw, "web", progress=take)
    assert [(volume.name, volume.snapshots) for volume in store.volumes()] == [("web", 1)]
    assert contents(store, "web")[:8] == b"precious"
    assert len(store._opened.catalog.rows(VolumeRow)) == 1


def test_an_import_that_fails_leaves_a_volume_that_took_its_name(store: Store, raw: Path) -> None:
    def take(done: int, total: int) -> None:
        with store.create("web", size=BLOCK) as volume:
            volume.write(0, b"precious")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_image(store, raw, "web", progress=take)
    assert contents(store, "web")[:8] == b"precious"


def test_a_raw_image_that_is_written_to_while_it_is_imported_is_no_disk(store: Store, raw: Path) -> None:
    def write_to_it(done: int, total: int) -> None:
        with open(raw, "r+b") as file:
            file.write(b"later")
        os.utime(raw, ns=(1, 1))

    with pytest.raises(FormatError, match="changed while it was read"):
        import_image(store, raw, "web", progress=write_to_it)
    assert store.volumes() == []


def test_a_device_that_is_written_to_while_it_is_imported_is_no_disk(store: Store, raw: Path) -> None:
    with loop_devices() as make:
        device = make(raw)

        def write_to_it(done: int, total: int) -> None:
            with device.open("r+b") as file:
                file.write(b"later")

        with pytest.raises(FormatError, match="changed while it was read"):
            import_image(store, device, "web", progress=write_to_it)
    assert store.volumes() == []


@pytest.mark.parametrize("cut_at", [4 * BLOCK, 10 << 20], ids=["in data", "in a hole"])
def test_an_image_that_is_cut_short_while_it_is_imported_is_an_error(store: Store, raw: Path, cut_at: int) -> None:
    with pytest.raises(OSError, match="cut to") as failure:
        import_image(store, raw, "web", progress=lambda done, total: os.truncate(raw, cut_at))
    assert failure.value.errno == errno.EIO
    assert failure.value.filename == str(raw)
    assert store.volumes() == []


def test_a_qcow2_that_changes_while_it_is_converted_is_an_error(
    store: Store, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "disk.qcow2"
    qemu("convert", "-O", "qcow2", raw, image)
    real = qemu_img.run

    def change(*arguments: str, **options: Any) -> str:
        printed = real(*arguments, **options)
        if arguments[0] == "convert":
            os.truncate(image, image.stat().st_size // 2)
        return printed

    monkeypatch.setattr(qemu_img, "run", change)
    with pytest.raises(FormatError, match="changed while it was read"):
        import_image(store, image, "web")
    assert store.volumes() == []


def test_a_conversion_makes_no_copy_of_the_disk(
    store: Store, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> IO[bytes]:
        raise AssertionError("a conversion goes through a file")

    monkeypatch.setattr("onionskin.operations.export.passing_file", refuse)
    qemu("convert", "-O", "qcow2", raw, tmp_path / "disk")
    import_image(store, tmp_path / "disk", "web", wipe="zero")
    with store.open("web") as volume:
        export_image(volume, tmp_path / "out", format="qcow2")
    subprocess.run(["qemu-img", "compare", "-f", "raw", raw, tmp_path / "out"], check=True)


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx"])
@pytest.mark.slow
def test_a_disk_larger_than_any_file_here_is_exported(store: Store, tmp_path: Path, kind: str) -> None:
    with store.create("web", size="20T") as volume:
        volume.write(19 << 40, b"far")
        export_image(volume, tmp_path / "out", format=kind)
    command = ["qemu-img", "info", "--output=json", tmp_path / "out"]
    assert json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["virtual-size"] == 20 << 40
    if kind == "qcow2":
        import_image(store, tmp_path / "out", "again")
        with store.open("again") as volume:
            assert (volume.size_bytes, volume.read(19 << 40, 3)) == (20 << 40, b"far")


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhd", "vhdx", "vdi"])
def test_progress_of_a_conversion_is_known_from_the_first_to_the_last(
    store: Store, raw: Path, tmp_path: Path, kind: str
) -> None:
    import_image(store, raw, "web")
    out: list[tuple[int, int]] = []
    with store.open("web") as volume:
        export_image(volume, tmp_path / "out", format=kind, progress=lambda done, total: out.append((done, total)))
    into: list[tuple[int, int]] = []
    import_image(store, tmp_path / "out", "again", progress=lambda done, total: into.append((done, total)))
    for seen in (out, into):
        assert {total for _, total in seen} == {16 << 20}
        assert seen == sorted(seen)
        assert seen[-1][0] == 16 << 20


def test_an_empty_image_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="empty"):
        import_image(store, tmp_path / "empty", "web")


def test_a_name_that_is_taken_is_refused_and_kept(store: Store, raw: Path) -> None:
    import_image(store, raw, "web")
    with pytest.raises(VolumeExistsError):
        import_image(store, raw, "web")
    assert contents(store, "web") == raw.read_bytes()


def test_without_qemu_img_the_package_is_named(
    store: Store, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu("convert", "-O", "qcow2", raw, tmp_path / "disk")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OnionskinError, match="qemu-utils"):
        import_image(store, tmp_path / "disk", "web")
    import_image(store, raw, "web")  # raw needs nothing


def test_an_export_never_replaces_a_file(store: Store, raw: Path, tmp_path: Path) -> None:
    import_image(store, raw, "web")
    (tmp_path / "out").write_text("mine")
    with store.open("web") as volume:
        for kind in ("raw", "qcow2"):
            with pytest.raises(FileExistsError):
                export_image(volume, tmp_path / "out", format=kind)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(
    store: Store, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(store, raw, "web")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "qemu-img").write_text("#!/bin/sh\necho 'qemu-img: no luck' >&2\nexit 1\n")
    (tools / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    target = tmp_path / "target"
    target.mkdir()
    with store.open("web") as volume, pytest.raises(FormatError, match="no luck"):
        export_image(volume, target / "out.qcow2", format="qcow2")
    assert list(target.iterdir()) == []


def test_an_exported_snapshot_is_the_snapshot(store: Store, raw: Path, tmp_path: Path) -> None:
    import_image(store, raw, "web")
    with store.open("web") as volume:
        volume.snapshot("clean")
        volume.write(0, b"later")
    with store.open("web", snapshot="clean") as view:
        export_image(view, tmp_path / "out.qcow2", format="qcow2")
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", tmp_path / "out.qcow2"], check=True, capture_output=True
    )
    assert json.loads(info.stdout)["format"] == "qcow2"
    subprocess.run(["qemu-img", "compare", "-f", "raw", raw, tmp_path / "out.qcow2"], check=True)


def test_a_compressed_image_is_written_where_only_it_has_room_and_one_that_has_none_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    with store.create("web", size="1M") as volume:
        volume.write(0, b"compressible" * 80_000)

        def little(path: Any) -> os.statvfs_result:
            found = list(real(path))
            found[4] = (256 << 10) // found[1]  # f_bavail
            return os.statvfs_result(found)

        monkeypatch.setattr(os, "statvfs", little)
        export_image(volume, tmp_path / "packed.qcow2", format="qcow2", compress=True)
        with pytest.raises(OSError, match="free some room"):
            export_image(volume, tmp_path / "whole.qcow2", format="qcow2")
        # A disk that is full in between, as `qemu_img.run` says it.
        monkeypatch.setattr(
            qemu_img, "write_image", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
        )
        with pytest.raises(OSError, match="full"):
            export_image(volume, tmp_path / "full.qcow2", format="qcow2", compress=True)
    assert sorted(path.name for path in tmp_path.glob("*.qcow2*")) == ["packed.qcow2"]
