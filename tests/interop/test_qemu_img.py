"""Images that qemu-img made are read, and images that we make are read by qemu-img, byte for byte."""

import hashlib
import os
import subprocess
import sys
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


QCOW2S = {
    "plain": [],
    "small clusters": ["-o", "cluster_size=4096"],
    "subclusters": ["-o", "extended_l2=on,cluster_size=2M"],
    "version 2": ["-o", "compat=0.10"],
    "metadata": ["-o", "preallocation=metadata"],
    "zlib": ["-c"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
}
DATA = np.random.default_rng(8).integers(0, 256, 700_000, dtype=np.uint8).tobytes()
SIZES = {"whole": 1 << 20, "odd": 700_416}  # the data ends within the disk, or with it, in the middle of a cluster


@pytest.fixture
def scattered(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "disk.raw").write_bytes(DATA)
    os.truncate(tmp_path / "disk.raw", request.param)
    return tmp_path / "disk.raw"


def imported(path: Path, directory: Path) -> bytes:
    with Store(directory) as store:
        import_image(store, path, "web")
        with store.open("web") as volume:
            return bytes(volume.read(0, volume.size_bytes))


@pytest.mark.parametrize("scattered", SIZES.values(), ids=SIZES, indirect=True)
@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("qcow2", options) for options in QCOW2S.values()), ("vmdk", []), ("vmdk", ["-o", "subformat=streamOptimized"])],
    ids=[*QCOW2S, "vmdk", "streamOptimized"],
)
def test_an_image_that_lacks_a_byte_of_the_disk_is_refused_and_what_lacks_none_is_read(
    scattered: Path, tmp_path: Path, kind: str, options: list[str]
) -> None:
    qemu_img("convert", *options, "-f", "raw", "-O", kind, scattered, tmp_path / "disk")
    whole, size_bytes = scattered.read_bytes(), (tmp_path / "disk").stat().st_size
    assert imported(tmp_path / "disk", tmp_path / "whole") == whole
    is_refused = []
    for number, cut in enumerate((1, 300, 512, 2000, 40_000, 65_000)):
        os.truncate(tmp_path / "disk", size_bytes - cut)
        try:
            found = imported(tmp_path / "disk", tmp_path / f"cut{number}")
        except FormatError:
            is_refused.append(True)
        else:
            assert found == whole, cut
            is_refused.append(False)
    assert is_refused == sorted(is_refused) and is_refused[-1]


def test_an_image_with_tables_is_read_by_its_descriptor(raw: Path, tmp_path: Path) -> None:
    """qemu-img has no /dev/fd/5 of ours, and its own stdin is nothing."""
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "disk")
    lines = (
        f"onionskin import - {tmp_path}/s/stdin < {tmp_path}/disk",
        f"exec 5< {tmp_path}/disk; onionskin import /dev/fd/5 {tmp_path}/s/five",
        f"exec 5< {tmp_path}/disk; onionskin import /proc/self/fd/5 {tmp_path}/s/own",
        f"onionskin compare /dev/stdin {raw} < {tmp_path}/disk",
        f"exec 5< {tmp_path}/disk; onionskin compare {raw} /dev/fd/5",
        *(f"onionskin compare {tmp_path}/s/{name} {raw}" for name in ("stdin", "five", "own")),
    )
    command = f'{sys.executable} -m onionskin "$@"'
    for line in lines:
        ended = subprocess.run(
            ["bash", "-c", f"onionskin() {{ {command}; }}; {line}"], stdin=subprocess.DEVNULL, capture_output=True
        )
        assert ended.returncode == 0, (line, ended.stderr)


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
