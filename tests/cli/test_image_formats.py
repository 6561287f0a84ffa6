"""An image of a known format is never taken for the bytes of a raw disk without a word."""

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from onionskin.errors import FormatError
from onionskin.exchange.image_formats import KNOWN
from onionskin.exchange.streams import COMPRESSED
from onionskin.images import FORMATS, detect_format, import_image
from onionskin.store import Store

Run = Callable[..., Result]
DISK = bytes(range(256)) * 4096


def old_tar() -> bytes:
    header = bytearray(b"disk.raw".ljust(100, b"\0") + b"0000644\0" * 3 + b"00000004000\0" * 2).ljust(512, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + DISK


FILES = {
    "qcow2": b"QFI\xfb\0\0\0\3" + DISK,
    "vmdk": b"KDMV\1\0\0\0" + DISK,
    "vhd": b"conectix" + DISK,
    "fixed vhd": DISK + b"conectix" + bytes(504),
    "vhdx": b"vhdxfile" + DISK,
    "vdi": bytes(64) + struct.pack("<I", 0xBEDA107F) + DISK,
    "qed": b"QED\0" + DISK,
    "parallels": b"WithoutFreeSpace" + DISK,
    "luks": b"LUKS\xba\xbe\0\2" + DISK,
    "gzip": gzip.compress(DISK),
    "xz": lzma.compress(DISK),
    "bzip2": bz2.compress(DISK),
    "zstd": b"\x28\xb5\x2f\xfd" + DISK,
    "lz4": b"\x04\x22\x4d\x18" + DISK,
    "old lz4": b"\x02\x21\x4c\x18" + DISK,
    "parallel zstd": b"\x50\x2a\x4d\x18" + DISK,
    "frame to skip before zstd": b"\x5f\x2a\x4d\x18" + DISK,
    "qcow": b"QFI\xfb\0\0\0\1" + DISK,
    "dmg": DISK + b"koly\0\0\0\4" + bytes(504),
    "lzma": lzma.compress(DISK, format=lzma.FORMAT_ALONE),
    "lzip": b"LZIP\1" + DISK,
    "lzop": b"\x89LZO\0\r\n\x1a\n" + DISK,
    "compress": b"\x1f\x9d\x90" + DISK,
    "zip": b"PK\3\4" + DISK,
    "7z": b"7z\xbc\xaf\x27\x1c" + DISK,
    "tar": bytes(257) + b"ustar" + DISK,
    "old tar": old_tar(),
    "vma": b"VMA\0" + DISK,
    "bochs": b"Bochs Virtual HD Image" + DISK,
    "cloop": b"#!/bin/sh\n#V2.0 Format\n" + DISK,
    "simg": b"\x3a\xff\x26\xed\1\0" + DISK,
    "rar": b"Rar!\x1a\x07\1\0" + DISK,
    "wim": b"MSWIM\0\0\0" + DISK,
    "lrzip": b"LRZI\0\6" + DISK,
    "rbd": b"rbd image v2\n" + DISK,
    "diff of rbd": b"rbd diff v1\n" + DISK,
    "delta": b"ONIONDLT" + DISK,
    "segment of a store": b"ONIONSEG" + DISK,
    "map of a store": b"ONIONMAP" + DISK,
    "ewf": b"EVF\x09\x0d\x0a\xff\0" + DISK,
    "logical ewf": b"LVF\x09\x0d\x0a\xff\0" + DISK,
    "second ewf": b"EVF2\x0d\x0a\x81\0" + DISK,
    "described vmdk": b"# Disk DescriptorFile\nversion=1\n",
    "otherwise described vmdk": b"# mine\r\n\r\nversion=1\r\nCID=fffffffe\r\n",
    "sesparse": b"\xbe\xba\xfe\xca\0\0\0\0" + DISK,
    "sparse dmg": b"sprs\0\0\0\3" + DISK,
    "encrypted dmg": b"encrcdsa\0\0\0\2" + DISK,
    "old zstd": b"\x27\xb5\x2f\xfd" + DISK,
    "sized lzma": b"\x5d\0\0\x80\0" + struct.pack("<Q", len(DISK)) + DISK,
    "split zip": b"PK\7\x08PK\3\4" + DISK,
    "cpio": b"070701" + DISK,
    "aff": b"AFF10\r\n\0" + DISK,
    "chd": b"MComprHD" + DISK,
    "partclone": b"partclone-image\0" + DISK,
    "partimage": b"PaRtImAgE-VoLuMe" + DISK,
    "ntfsclone": b"\0ntfsclone-image" + DISK,
    "zfs-stream": bytes(8) + struct.pack("<Q", 0x2F5BACBAC) + DISK,
    "of a big machine: zfs-stream": bytes(8) + struct.pack(">Q", 0x2F5BACBAC) + DISK,
    "btrfs-stream": b"btrfs-stream\0\1\0\0\0" + DISK,
    "snappy": b"\xff\x06\0\0sNaPpY" + DISK,
    "openssl": b"Salted__" + DISK,
    "age": b"age-encryption.org/v1\n" + DISK,
    "gpg": b"-----BEGIN PGP MESSAGE-----\n" + DISK,
    "xml": b'<?xml version="1.0"?>\n<Envelope>',
    "html": b"\n<!DOCTYPE html>\n<title>404 Not Found</title>",
    "vmx": b'.encoding = "UTF-8"\n',
    "lfs": b"version https://git-lfs.github.com/spec/v1\n",
}
ADVICE = "(import it|convert it|unpack it|export the volume|apply it to a volume|decrypt it) with|import the|fetch the"
NOT_READ = [name for name in FILES if name.split()[-1] not in {*FORMATS, *COMPRESSED}]


@pytest.fixture(params=FILES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "image"
    path.write_bytes(FILES[request.param])
    return request.param.split()[-1], path


def test_each_known_format_has_a_file_here() -> None:
    assert {name.split()[-1] for name in FILES} == KNOWN


def test_a_format_is_told(image: tuple[str, Path]) -> None:
    assert detect_format(image[1]) == image[0]


def test_it_is_no_base_unless_somebody_vouches_for_its_bytes(tmp_path: Path, image: tuple[str, Path]) -> None:
    with Store(tmp_path / "vms") as store:
        with pytest.raises(FormatError, match=rf"and not a raw disk: ({ADVICE})"):
            store.create("web", base=image[1])
        assert store.volumes() == []
        with store.create("web", base=image[1], base_format="raw") as web:
            assert web.read(0, web.size_bytes) == image[1].read_bytes()


def test_the_command_line_refuses_it_as_a_base_and_leaves_no_store(
    run: Run, tmp_path: Path, image: tuple[str, Path]
) -> None:
    refused = run("create", f"{tmp_path}/vms/web", "--base", image[1])
    assert refused.exit_code == 6
    assert "not a raw disk" in refused.stderr
    assert not (tmp_path / "vms").exists()
    assert run("create", f"{tmp_path}/vms/web", "--base", image[1], "--format", "raw").exit_code == 0


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_not_imported_as_bytes_unless_that_is_asked_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(FILES[name])
    with Store(tmp_path / "vms") as store:
        with pytest.raises(
            FormatError,
            match=rf"which is not read here: ({ADVICE})",
        ):
            import_image(store, path, "web")
        assert store.volumes() == []
        import_image(store, path, "web", format="raw")
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == path.read_bytes()


@pytest.mark.parametrize("suffix", ["qed", "luks", "gz", "xz", "zst", "bz2", "avhdx", "hdd", "tgz"])
def test_no_raw_image_is_written_under_the_name_of_another_format(run: Run, tmp_path: Path, suffix: str) -> None:
    assert run("create", f"{tmp_path}/vms/web", "--size", "1M").exit_code == 0
    refused = run("export", f"{tmp_path}/vms/web", tmp_path / f"out.{suffix}")
    assert refused.exit_code == 2
    assert "give --format" in refused.stderr
    assert run("export", f"{tmp_path}/vms/web", tmp_path / f"out.{suffix}", "--format", "raw").exit_code == 0


def test_a_disk_that_a_format_does_not_hold_is_no_damage(run: Run, tmp_path: Path) -> None:
    assert run("create", f"{tmp_path}/vms/web", "--size", "3T").exit_code == 0
    refused = run("export", f"{tmp_path}/vms/web", tmp_path / "out.vhd")
    assert refused.exit_code == 2
    assert "makes no vhd image of this disk: Disk size is too large" in refused.stderr
    assert "choose another format" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vms"]


def test_a_delta_that_is_given_to_import_is_no_disk(run: Run, tmp_path: Path) -> None:
    assert run("create", f"{tmp_path}/vms/web", "--size", "1M").exit_code == 0
    assert run("snapshot", f"{tmp_path}/vms/web@a").exit_code == 0
    assert run("delta", f"{tmp_path}/vms/web@a", "--output", tmp_path / "a.delta").exit_code == 0
    refused = run("import", tmp_path / "a.delta", f"{tmp_path}/vms/new")
    assert refused.exit_code == 6
    assert "apply it to a volume with 'onionskin apply'" in refused.stderr


def test_a_format_of_a_base_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(DISK)
    with Store(tmp_path / "vms") as store, pytest.raises(ValueError, match="is no format of a base"):
        store.create("web", base=tmp_path / "image", base_format="qcow2")  # type: ignore[arg-type]


def test_a_fifo_as_a_base_is_refused_and_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused = run("create", f"{tmp_path}/vms/web", "--base", tmp_path / "fifo")
    assert refused.exit_code == 6
    assert "is not a regular file" in refused.stderr
