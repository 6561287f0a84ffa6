"""Images that qemu-img made are read, and images that we make are read by qemu-img, byte for byte."""

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from onionskin.errors import FormatError
from onionskin.images import export_image, import_image
from onionskin.store import Store

SIZE = 24 << 20
FORMATS = ["qcow2", "vmdk", "vhd", "vhdx", "vdi"]


def qemu_img(*arguments: str | Path) -> None:
    """Run qemu-img, which calls a VHD vpc, and makes one of another size where that is not forbidden."""
    words = ["vpc" if word == "vhd" else str(word) for word in arguments]
    if words[0] == "convert" and words[words.index("-O") + 1] == "vpc":
        words[1:1] = ["-o", "force_size=on"]
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data of all sizes at scattered places, the first and the last block among them."""
    rng = np.random.default_rng(7)
    disk = np.zeros(SIZE, dtype=np.uint8)
    for start in [0, SIZE - 4096, *rng.integers(0, SIZE - 300_000, 40)]:
        length = int(rng.integers(1, 4096 if start in (0, SIZE - 4096) else 300_000))
        disk[start : start + length] = rng.integers(0, 256, length, dtype=np.uint8)
    disk[-1] = 1
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    disk.tofile(path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_qemu_img_is_read(raw: Path, tmp_path: Path, kind: str) -> None:
    qemu_img("convert", "-f", "raw", "-O", kind, raw, tmp_path / "disk")
    with Store(tmp_path / "store") as store:
        import_image(store, tmp_path / "disk", "web")
        with store.open("web") as volume:
            export_image(volume, tmp_path / "out.raw")
    assert digest(tmp_path / "out.raw") == digest(raw)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_ours_is_read_by_qemu_img(raw: Path, tmp_path: Path, kind: str) -> None:
    with Store(tmp_path / "store") as store:
        import_image(store, raw, "web")
        with store.open("web") as volume:
            export_image(volume, tmp_path / "disk", format=kind)
    qemu_img("convert", "-f", kind, "-O", "raw", tmp_path / "disk", tmp_path / "back.raw")
    assert digest(tmp_path / "back.raw") == digest(raw)


def test_a_compressed_qcow2_is_read(raw: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, tmp_path / "disk")
    with Store(tmp_path / "store") as store:
        import_image(store, tmp_path / "disk", "web")
        with store.open("web") as volume:
            assert hashlib.sha256(volume.read(0, volume.size_bytes)).hexdigest() == digest(raw)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_an_image_that_was_cut_short_is_refused(raw: Path, tmp_path: Path, kind: str, share: float) -> None:
    qemu_img("convert", "-f", "raw", "-O", kind, raw, tmp_path / "disk")
    os.truncate(tmp_path / "disk", int((tmp_path / "disk").stat().st_size * share))
    with Store(tmp_path / "store") as store:
        with pytest.raises(FormatError):
            import_image(store, tmp_path / "disk", "web")
        assert store.volumes() == []


def test_a_fixed_vhd_is_told_by_its_end_and_read(raw: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vhd", "-o", "subformat=fixed", raw, tmp_path / "disk")
    with Store(tmp_path / "store") as store:
        import_image(store, tmp_path / "disk", "web")
        with store.open("web") as volume:
            assert hashlib.sha256(volume.read(0, volume.size_bytes)).hexdigest() == digest(raw)


def test_a_vhd_that_has_only_what_changed_is_refused(raw: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vhd", raw, tmp_path / "disk")
    with (tmp_path / "disk").open("r+b") as file:
        file.seek(-512 + 60, os.SEEK_END)
        file.write((4).to_bytes(4, "big"))
    with Store(tmp_path / "store") as store:
        with pytest.raises(FormatError, match="only what changed over another one"):
            import_image(store, tmp_path / "disk", "web")
        assert store.volumes() == []
