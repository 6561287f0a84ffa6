"""Policy `zero` leaves nothing of what was freed in the raw bytes of the file system that held the store."""

import os
from pathlib import Path

import pytest
from conftest import image_of, unmount

import onionskin

CANARY = b"onionskin-canary-" + os.urandom(8).hex().encode()
BLOCK = 4096
FILL = (CANARY * (BLOCK // len(CANARY) + 1))[:BLOCK] * 64


def holds_canary(image: Path) -> bool:
    with image.open("rb") as file:
        tail = b""
        while chunk := file.read(1 << 22):
            if CANARY in tail + chunk:
                return True
            tail = chunk[-len(CANARY) :]
    return False


def trim(web: onionskin.Volume) -> None:
    web.trim(0, web.size_bytes)
    web.flush()


def revert(web: onionskin.Volume) -> None:
    web.revert("start")


def merge(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.write(0, b"z" * len(FILL))
    web.merge("middle")


def merge_then_trim(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.merge("middle")
    trim(web)


def discard(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.revert("start")
    web.discard("middle")


@pytest.mark.parametrize("free", [trim, revert, merge, merge_then_trim, discard])
@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_nothing_is_left_of_freed_blocks(request: pytest.FixtureRequest, system: str, free) -> None:
    root = request.getfixturevalue(f"{system}_mount")()
    with onionskin.Store(root / "store") as store, store.create("web", size="8M", wipe="zero") as web:
        web.snapshot("start")
        web.write(0, FILL)
        web.flush()
        os.sync()
        assert holds_canary(image_of(root))
        free(web)
    unmount(root)
    assert not holds_canary(image_of(root))


def test_release_leaves_it_as_documented(ext4_mount) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store, store.create("web", size="8M") as web:
        web.write(0, FILL)
        trim(web)
    unmount(root)
    assert holds_canary(image_of(root))
