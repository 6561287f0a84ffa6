"""A base is the file that was opened and locked, whatever its path names: nothing is written to another file, nor dropped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onionskin
from onionskin import store as stores
from onionskin.catalog import BaseRow
from onionskin.storage import base_looks

SIZE = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * SIZE)
    return path


@pytest.fixture
def web(tmp_path: Path, base: Path) -> Iterator[onionskin.Volume]:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=base) as web:
        web.write(0, b"new" * 1000)
        web.flush()
        yield web


def exchange(base: Path) -> Path:
    """Put another image in the base's place; returns where the base itself is then."""
    kept = base.with_name("kept.raw")
    shutil.copy2(base, base.with_name("other.raw"))
    base.rename(kept)
    base.with_name("other.raw").write_bytes(b"x" * SIZE)
    base.with_name("other.raw").rename(base)
    return kept


def expected() -> bytes:
    return b"new" * 1000 + b"b" * (SIZE - 3000)


def test_a_base_that_was_exchanged_before_a_merge_into_it_is_not_written(web: onionskin.Volume, base: Path) -> None:
    kept = exchange(base)
    with pytest.raises(onionskin.ChainError, match="nothing was dropped"):
        web.merge_into_base()
    assert base.read_bytes() == b"x" * SIZE
    assert kept.read_bytes() == b"b" * SIZE
    assert web.read(0, SIZE) == expected()


def test_a_base_that_is_exchanged_during_a_merge_into_it_loses_nothing(web: onionskin.Volume, base: Path) -> None:
    def exchange_once(done: int, total: int) -> None:
        if not base.with_name("kept.raw").exists():
            exchange(base)

    with pytest.raises(onionskin.ChainError, match="nothing was dropped"):
        web.merge_into_base(progress=exchange_once)
    assert base.read_bytes() == b"x" * SIZE
    assert web.read(0, SIZE) == expected()
    base.with_name("kept.raw").replace(base)
    web.merge_into_base()
    assert base.read_bytes() == web.read(0, SIZE) == expected()


def test_a_base_that_is_relocated_during_a_merge_into_it_loses_nothing(web: onionskin.Volume, base: Path) -> None:
    moved = base.with_name("moved.raw")
    refused: list[Exception] = []

    def relocate(done: int, total: int) -> None:
        if not moved.exists():
            shutil.copy2(base, moved)
            with onionskin.Store(web.store.path) as other:
                try:
                    other.relocate("web", base=moved, trust=True)
                except onionskin.StateError as error:
                    refused.append(error)

    try:
        web.merge_into_base(progress=relocate)
    except onionskin.OnionskinError as error:
        assert "relocated" in str(error)
    assert web.read(0, SIZE) == expected()
    name, store = Path(web.store.info("web").base or ""), web.store
    web.close()
    assert name == (base if refused else moved)
    with store.open("web") as again:
        assert again.read(0, SIZE) == expected()
        again.merge_into_base()
        assert name.read_bytes() == expected()


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_base_that_another_volume_has_under_another_name_is_not_merged_into(
    web: onionskin.Volume, base: Path, link: str
) -> None:
    other_name = base.with_name("other name")
    getattr(other_name, link)(base)
    with web.store.create("other", base=other_name) as other:
        with pytest.raises(onionskin.StateError):
            web.merge_into_base()
        assert other.read(0, SIZE) == b"b" * SIZE
        other.close()
        with pytest.raises(onionskin.StateError, match="other"):
            web.merge_into_base()
    assert base.read_bytes() == b"b" * SIZE


def test_the_digest_that_lets_a_base_be_relocated_is_that_of_the_file_that_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, moved = tmp_path / "image.raw", tmp_path / "moved.raw"
    image.write_bytes(b"b" * SIZE)
    moved.write_bytes(b"x" * SIZE)
    describe = stores.described_base

    @contextmanager
    def and_exchanged(path: Path, **how: bool) -> Iterator[BaseRow]:
        with describe(path, **how) as row:
            shutil.copy(image, tmp_path / "right.raw")
            (tmp_path / "right.raw").rename(moved)
            yield row

    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", base=image, digest=True).close()
        monkeypatch.setattr(stores, "described_base", and_exchanged)
        with pytest.raises(onionskin.VerifyError):
            store.relocate("web", base=moved, verify=True)


def test_a_volume_over_a_later_image_at_the_path_is_not_relocated_with_one_over_the_first(
    tmp_path: Path, base: Path
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        for name in "first", "beside":
            store.create(name, base=base).close()
        first = exchange(base)
        store.create("later", base=base).close()
        store.relocate("first", base=first)
        for name, byte in {"first": b"b", "beside": b"b", "later": b"x"}.items():
            with store.open(name) as volume:
                assert volume.read(0, SIZE) == byte * SIZE


@pytest.mark.parametrize("relocates", [False, True])
def test_a_link_that_leads_into_the_store_once_it_is_locked_is_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relocates: bool
) -> None:
    image, link = tmp_path / "image", tmp_path / "link"
    image.write_bytes(bytes(1 << 20))
    link.symlink_to(image)
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", base=image).close()
        inside = store.path / "inside"
        inside.write_bytes(bytes(1 << 20))
        describe = stores.described_base

        def exchanged(*given: Any, **options: Any) -> Any:
            link.unlink()
            link.symlink_to(inside)
            return describe(*given, **options)

        monkeypatch.setattr(stores, "described_base", exchanged)
        with pytest.raises(onionskin.ChainError, match="a file of the store itself"):
            if relocates:
                store.relocate("web", base=link, trust=True)
            else:
                store.create("over", base=link)


@pytest.mark.parametrize("inode", [1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("year", [1900, 1970, 2262, 2263, 2446])
def test_a_base_may_have_any_inode_and_be_of_any_year(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inode: int, year: int
) -> None:
    """Network and overlay file systems have inodes of 64 bits, and ext4 and XFS times beyond those that 63 bits hold."""
    (tmp_path / "base.raw").write_bytes(b"base" * 1024)
    found, time_ns = (tmp_path / "base.raw").stat(), (year - 1970) * 31_556_952 * 10**9

    def look(descriptor: int) -> Any:
        looks = {name: getattr(found, name) for name in ("st_mode", "st_size", "st_dev")}
        return SimpleNamespace(**looks, st_ino=inode, st_mtime_ns=time_ns)

    with onionskin.Store(tmp_path / "store") as store:
        monkeypatch.setattr(base_looks, "os", SimpleNamespace(**vars(os) | {"fstat": look}))
        store.create("web", base=tmp_path / "base.raw").close()
        with store.open("web") as web:
            assert web.read(0, 4) == b"base"
        time_ns += 1
        with pytest.raises(onionskin.ChainError, match="changed"):
            store.open("web")
