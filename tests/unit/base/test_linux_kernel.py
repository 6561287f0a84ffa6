"""What the file of a kernel says of itself."""

from pathlib import Path

import pytest

from onionskin.base.linux_kernel import RELEASE_BYTES_MAX, numbers_of, release_of, release_of_file


def kernel(text: bytes, offset: int = 0x100) -> bytes:
    head = bytes(0x202) + b"HdrS" + bytes(8) + offset.to_bytes(2, "little")
    return head.ljust(0x200 + offset, b"\0") + text


def test_the_release_is_read_from_the_header(tmp_path: Path) -> None:
    image = kernel(b"6.12.95+deb12-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP\0")
    assert release_of(image) == "6.12.95+deb12-cloud-amd64"
    (tmp_path / "vmlinuz").write_bytes(image)
    assert release_of_file(tmp_path / "vmlinuz") == "6.12.95+deb12-cloud-amd64"
    assert release_of_file(tmp_path / "none") == ""


@pytest.mark.parametrize(
    "image",
    [
        b"",
        bytes(0x202) + b"HdrS",
        kernel(b"6.1\0", 0),
        kernel(b"", 0xFFFF),
        kernel(b"none\0"),
        b"\x7fELF" + bytes(0x1000),
    ],
)
def test_what_is_no_kernel_or_says_nothing_has_no_release(image: bytes) -> None:
    assert release_of(image) == ""


def test_a_release_without_an_end_is_bounded() -> None:
    assert len(release_of(kernel(b"6.1" + b"x" * 10_000))) == RELEASE_BYTES_MAX


def test_the_two_first_numbers_of_a_release_are_compared_as_numbers() -> None:
    assert numbers_of("6.12.95-cloud") == (6, 12) > numbers_of("6.1.0-53") == (6, 1)
    assert numbers_of("linux") == (0, 0)
