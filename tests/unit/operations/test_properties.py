"""A wipe policy that is changed holds for what the volume has by then, in its head and in its snapshots."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import image_of, unmount

import onionskin

CANARY = b"onionskin-canary-" + os.urandom(8).hex().encode()
BLOCK = 4096
FILL = (CANARY * (BLOCK // len(CANARY) + 1))[:BLOCK] * 64


def trim(web: onionskin.Volume) -> None:
    web.trim(0, web.size_bytes)
    web.flush()


def revert(web: onionskin.Volume) -> None:
    web.revert("start")


def merge(web: onionskin.Volume) -> None:
    web.snapshot("middle")
    web.write(0, b"z" * len(FILL))
    web.merge("middle")


@pytest.mark.parametrize("free", [trim, revert, merge])
def test_what_was_written_before_is_overwritten_when_it_is_freed(
    ext4_mount: Callable[[], Path], free: Callable[[onionskin.Volume], None]
) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store:
        with store.create("web", size="8M") as web:
            web.snapshot("start")
            web.write(0, FILL)
        store.set_wipe("web", "zero")
        with store.open("web") as web:
            assert (web.wipe, web.read(0, len(FILL))) == ("zero", FILL)
            free(web)
    unmount(root)
    assert CANARY not in image_of(root).read_bytes()


def test_what_snapshots_hold_is_overwritten_too(ext4_mount: Callable[[], Path]) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store:
        with store.create("web", size="8M") as web:
            web.snapshot("start")
            web.write(0, FILL)
            web.snapshot("middle")
            web.revert("start")
        store.set_wipe("web", "zero")
        with store.open("web") as web:
            web.discard("middle")
    unmount(root)
    assert CANARY not in image_of(root).read_bytes()


def test_slots_that_wait_to_be_freed_are_overwritten_too(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="8M") as web:
            web.write(0, FILL)
            web.snapshot("a")
            web.write(0, b"z" * len(FILL))
            web.snapshot("b")
        with store.open("web", snapshot="a"):
            with store.open("web") as web:
                web.merge("a")
            store.set_wipe("web", "zero")
            waiting = {row.wipe for row in store._opened.catalog.reclaims() if row.kind == "scrub"}
            assert waiting == {"zero"}
        with store.open("web") as web:
            assert web.read(0, 1) == b"z"


def test_a_clone_keeps_its_policy_and_what_it_shares_has_that_of_its_origin(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("golden", size="8M") as golden:
            golden.write(0, FILL)
            golden.snapshot("clean")
        store.clone("golden", "clean", "test")
        store.set_wipe("test", "zero")
        assert (store.info("golden").wipe, store.info("test").wipe) == ("release", "zero")
        store.set_wipe("test", "release")
        store.set_wipe("golden", "zero")
        assert (store.info("golden").wipe, store.info("test").wipe) == ("zero", "release")
        store.clone("golden", "clean", "later")
        assert store.info("later").wipe == "zero"


def test_a_laxer_policy_leaves_what_snapshots_hold_to_the_stricter_one(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="8M", wipe="zero") as web:
            web.write(0, FILL)
            web.snapshot("a")
        store.set_wipe("web", "release")
        catalog = store._opened.catalog
        assert {layer.wipe for layer in catalog.chain(catalog.volume("web").head)} == {"zero", "release"}
        with store.open("web") as web:
            assert web.wipe == "release"
            web.write(0, b"z")
            web.snapshot("b")
            assert web.read(0, 2) == b"z" + FILL[1:2]
        assert store.info("web").wipe == "release" and store.check() == []


def test_a_policy_is_not_changed_under_whoever_has_the_volume_open(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="8M"), pytest.raises(onionskin.StateError, match="web"):
            store.set_wipe("web", "zero")
        with pytest.raises(ValueError, match="wipe policy"):
            store.set_wipe("web", "shred")  # type: ignore[arg-type]
        with pytest.raises(onionskin.VolumeNotFoundError):
            store.set_wipe("none", "zero")
        assert store.info("web").wipe == "release"
        store.set_wipe("web", "zero")
    with onionskin.Store(tmp_path / "store") as store:
        assert store.info("web").wipe == "zero"
