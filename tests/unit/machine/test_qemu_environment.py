"""What QEMU is started with beside its command line."""

import pytest

from onionskin.machine.qemu import _with_large_pages


@pytest.mark.parametrize(
    ("tunables", "wanted"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_qemu_takes_large_pages_unless_its_user_says_otherwise(tunables: str, wanted: str) -> None:
    assert _with_large_pages(tunables) == wanted
