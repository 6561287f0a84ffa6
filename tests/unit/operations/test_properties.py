"""A wipe policy that is changed holds for what the volume has by then, in its head and in its snapshots; the defaults of a
store hold for the volumes that are made later.
"""

import io
import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from conftest import image_of, unmount

import onionskin
from onionskin.delta import apply, delta
from onionskin.images import import_image

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


# ---- the defaults of a store ----


def test_a_volume_that_is_made_without_saying_how_is_as_the_store_says(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        assert store.defaults() == ("release", BLOCK)
        store.create("before", size="1M").close()
        assert store.set_defaults(wipe="zero", block_size=1 << 16) == ("zero", 1 << 16)
        with onionskin.Store(tmp_path / "store") as elsewhere, elsewhere.create("web", size="1M") as web:
            assert (web.wipe, web.block_size) == ("zero", 1 << 16)
        with store.create("other", size="1M", wipe="release", block_size=BLOCK) as other:
            assert (other.wipe, other.block_size) == ("release", BLOCK)
        assert (store.info("before").wipe, store.info("before").block_size) == ("release", BLOCK)
        about = store.store_info()
        assert (about.default_wipe, about.default_block_size) == ("zero", 1 << 16)


def test_an_image_is_imported_as_the_store_says_from_a_file_and_from_a_pipe(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(b"a" * (1 << 16))
    with onionskin.Store(tmp_path / "store") as store:
        store.set_defaults(wipe="zero", block_size=8192)
        import_image(store, image, "file")
        with subprocess.Popen(["cat", image], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            import_image(store, cat.stdout, "pipe")
        import_image(store, image, "said", wipe="release", block_size=BLOCK)
        assert [(one.wipe, one.block_size) for one in store.volumes()] == [
            ("zero", 8192),
            ("zero", 8192),
            ("release", BLOCK),
        ]


def test_clones_forks_and_what_a_delta_brings_have_the_policy_of_their_volume(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("golden", size="1M") as golden:
            golden.write(0, FILL)
            golden.snapshot("clean")
        store.set_defaults(wipe="zero")
        store.clone("golden", "clean", "clone")
        store.fork("golden@clean", names=["fork"])
        store.fork("golden", names=["head"])
        with store.create("taken", size="1M", wipe="release") as taken:
            stream = io.BytesIO()
            delta(store, "golden", None, "clean", stream)
            stream.seek(0)
            apply(stream, taken)
        assert {one.wipe for one in store.volumes()} == {"release"}


def test_what_a_default_policy_covers_is_overwritten(ext4_mount: Callable[[], Path]) -> None:
    root = ext4_mount()
    with onionskin.Store(root / "store") as store:
        store.set_defaults(wipe="zero")
        with store.create("web", size="8M") as web:
            web.write(0, FILL)
            web.flush()
            trim(web)
    unmount(root)
    assert CANARY not in image_of(root).read_bytes()


def test_one_default_is_changed_and_the_other_stays(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.set_defaults(block_size=1 << 21)
        assert store.set_defaults(wipe="zero") == store.set_defaults() == ("zero", 1 << 21)
        for wrong in ({"wipe": "shred"}, {"block_size": 5000}, {"block_size": 1 << 22}):
            with pytest.raises(ValueError, match=r"wipe policy|power of two"):
                store.set_defaults(**wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            store.set_defaults(block_size=True)
        assert store.defaults() == ("zero", 1 << 21)


@pytest.mark.parametrize("wrong", ["wipe = 'shred'", "wipe = x'00'", "block_size = 5000", "block_size = x'10'"])
def test_a_damaged_default_makes_no_volume_and_is_found(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "store"
    with onionskin.Store(path) as store:
        store.create("web", size="1M").close()
    with closing(sqlite3.connect(path / "catalog.db")) as catalog:
        catalog.execute(f"UPDATE store SET {wrong}")
        catalog.commit()
    with onionskin.Store(path) as store:
        for ask in (store.defaults, store.set_defaults, lambda: store.create("new", size="1M")):
            with pytest.raises(onionskin.FormatError, match="default"):
                ask()
        store.create("said", size="1M", wipe="zero", block_size=BLOCK).close()
        assert [problem.severity for problem in store.check()] == ["error"]
