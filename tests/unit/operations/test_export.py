"""An export is the disk at one instant, and takes the place of nothing that is needed."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.catalog import LayerRow
from onionskin.images import export_image
from onionskin.kernels._copy import CopyJob
from onionskin.operations import copy, export
from onionskin.operations.pinned import pinned

BLOCK = 4096
SIZE = 32 * BLOCK


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * SIZE)
    return path


@pytest.fixture
def web(store: onionskin.Store, base: Path) -> Iterator[onionskin.Volume]:
    with store.create("web", base=base) as volume:
        volume.write(BLOCK, b"w" * BLOCK)
        yield volume


def test_an_exported_head_is_as_it_was_when_the_export_began(
    web: onionskin.Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = web.read(0, SIZE)
    real = copy.copy_runs

    def write_first(*arguments: Any, **options: Any) -> None:
        web.trim(0, 2 * BLOCK)
        web.flush()
        web.write(8 * BLOCK, b"later" * BLOCK)  # into the slots that were freed
        web.flush()
        real(*arguments, **options)

    monkeypatch.setattr(copy, "copy_runs", write_first)
    web.export(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before
    assert web.read(8 * BLOCK, 5) == b"later"
    assert web.read(0, 2 * BLOCK) == bytes(2 * BLOCK)


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_was_sealed_for_an_export_is_folded_back(web: onionskin.Volume, tmp_path: Path, ends_well: bool) -> None:
    def stop(done: int, total: int) -> None:
        if not ends_well:
            raise KeyboardInterrupt

    layers = len(web.store._opened.catalog.rows(LayerRow))
    try:
        web.export(tmp_path / "out", progress=stop)
    except KeyboardInterrupt:
        assert not ends_well
    assert len(web.store._opened.catalog.rows(LayerRow)) == layers
    assert web.store.check() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["base.raw", "store"] + ["out"] * ends_well)


def test_a_volume_may_be_reverted_merged_and_closed_while_it_is_exported(
    store: onionskin.Store, web: onionskin.Volume, tmp_path: Path
) -> None:
    web.snapshot("a")
    web.write(0, b"2" * 3 * BLOCK)
    web.snapshot("b")
    web.write(0, b"3" * BLOCK)
    before = web.read(0, SIZE)
    steps = iter((lambda: web.merge("b"), lambda: web.revert("a"), web.close))

    def change(done: int, total: int) -> None:
        for step in steps:
            step()

    web.export(tmp_path / "out", progress=change)
    assert (tmp_path / "out").read_bytes() == before
    assert list(steps) == []
    with store.open("web") as again:
        assert again.read(0, 2 * BLOCK) == b"b" * BLOCK + b"w" * BLOCK
    assert store.check() == []


def test_two_states_may_be_pinned_at_once(web: onionskin.Volume) -> None:
    with pinned(web._opened) as first:
        web.write(0, b"2" * BLOCK)
        with pinned(web._opened) as second:
            web.write(0, b"3" * BLOCK)
            assert first.path.read(0, 1) == b"b"
            assert second.path.read(0, 1) == b"2"
        assert first.path.read(0, BLOCK) == b"b" * BLOCK
    assert web.read(0, 1) == b"3"
    assert web.store.check() == []


def test_a_base_that_changes_while_it_is_exported_is_no_image(
    web: onionskin.Volume, base: Path, tmp_path: Path
) -> None:
    def change(done: int, total: int) -> None:
        base.write_bytes(b"other" * SIZE)

    with pytest.raises(onionskin.ChainError, match="has changed"):
        web.export(tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_the_base_is_read_from_the_file_that_is_locked_whatever_its_path_names_now(
    web: onionskin.Volume, base: Path, tmp_path: Path
) -> None:
    web.snapshot("a")
    before = web.read(0, SIZE)
    with web.store.open("web", snapshot="a") as view:
        base.rename(tmp_path / "moved.raw")
        base.write_bytes(b"other" * SIZE)
        view.export(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before


# ---- what an image does not replace ----


def test_an_export_replaces_a_regular_file_that_nobody_needs(web: onionskin.Volume, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    web.export(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == web.read(0, SIZE)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_base_is_not_replaced_under_another_name(
    web: onionskin.Volume, base: Path, tmp_path: Path, link: "type[os.link]"
) -> None:
    link(base, tmp_path / "other")
    with pytest.raises(onionskin.StateError, match="base"):
        web.export(tmp_path / "other")
    assert base.read_bytes() == b"b" * SIZE


def test_the_base_of_an_open_volume_of_another_store_is_not_replaced(web: onionskin.Volume, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * BLOCK)
    with (
        onionskin.Store(tmp_path / "second") as second,
        second.create("mine", base=other),
        pytest.raises(onionskin.StateError, match="in use"),
    ):
        web.export(other)
    assert other.read_bytes() == b"o" * BLOCK


def test_a_base_that_is_made_while_the_image_is_written_is_not_replaced(web: onionskin.Volume, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"precious" * BLOCK)

    def stand_on_it(done: int, total: int) -> None:
        if not any(volume.name == "second" for volume in web.store.volumes()):
            web.store.create("second", base=target).close()

    with pytest.raises(onionskin.StateError, match="base"):
        web.export(target, progress=stand_on_it)
    assert target.read_bytes() == b"precious" * BLOCK


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_file_that_appears_while_an_image_is_written_is_kept(
    web: onionskin.Volume, tmp_path: Path, format: str
) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    with pytest.raises(FileExistsError) as failure:
        export_image(web, directory / "out", format=format, progress=lambda done, total: (directory / "out").touch())
    assert failure.value.filename == str(directory / "out")
    assert [path.name for path in directory.iterdir()] == ["out"]
    assert (directory / "out").stat().st_size == 0


def test_a_file_that_appears_just_when_the_image_gets_its_name_is_kept(
    web: onionskin.Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.give_name

    def appear(*arguments: Any, **options: Any) -> None:
        (tmp_path / "out").write_text("mine")
        real(*arguments, **options)

    monkeypatch.setattr(export, "give_name", appear)
    with pytest.raises(FileExistsError):
        export_image(web, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    assert list(tmp_path.glob("*.part")) == []


def test_a_name_is_given_on_a_file_system_without_hard_links(
    web: onionskin.Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    export_image(web, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == web.read(0, SIZE)
    with pytest.raises(FileExistsError):
        export.export(web._opened, tmp_path / "out", replace=False, progress=None)


def test_the_store_is_no_place_for_an_image_by_whatever_way_it_is_named(
    store: onionskin.Store, web: onionskin.Volume, tmp_path: Path
) -> None:
    store.finish_work()  # which makes and removes files
    (tmp_path / "way").symlink_to(store.path / "segments")
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "--bind", store.path / "segments", mount], check=True)
    try:
        for directory in (store.path, store.path / "layers", tmp_path / "way", mount):
            before = sorted(directory.iterdir())
            with pytest.raises(ValueError, match="in the store"):
                web.export(directory / "out")
            assert sorted(directory.iterdir()) == before
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_file_of_the_store_is_not_replaced_under_another_name(
    store: onionskin.Store, web: onionskin.Volume, tmp_path: Path
) -> None:
    os.link(store._opened.layout.lock, tmp_path / "lock")
    with pytest.raises(ValueError, match="file of the store"):
        web.export(tmp_path / "lock")


def test_a_device_or_directory_is_not_replaced(web: onionskin.Volume, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(FileExistsError, match="not a regular file"):
            web.export(tmp_path / name)


# ---- what a failed export leaves ----


@pytest.mark.parametrize(("wipe", "rest"), [("zero", False), ("release", True)])
def test_the_staged_file_of_an_export_that_fails_is_wiped_where_a_layer_wants_that(
    store: onionskin.Store, tmp_path: Path, wipe: str, rest: bool
) -> None:
    """Also where the volume itself does not: it is a clone with another policy."""
    with store.create("secret", size=SIZE, wipe=wipe) as secret:
        secret.write(0, b"canary" * BLOCK)
        secret.snapshot("a")
    store.clone("secret", "a", "clone", wipe="release")
    kept: list[int] = []

    def fail(done: int, total: int) -> None:
        (staged,) = tmp_path.glob("*.part")
        kept.append(os.open(staged, os.O_RDONLY))
        raise KeyboardInterrupt

    try:
        with store.open("clone") as clone, pytest.raises(KeyboardInterrupt):
            clone.export(tmp_path / "out", progress=fail)
        assert (b"canary" in os.pread(kept[0], SIZE, 0)) == rest
    finally:
        os.close(kept[0])
    assert list(tmp_path.glob("*.part")) == []


def test_an_export_of_a_closed_view_or_volume_is_refused(web: onionskin.Volume, tmp_path: Path) -> None:
    web.snapshot("a")
    view = web.store.open("web", snapshot="a")
    view.close()
    with pytest.raises(onionskin.StateError, match="closed"):
        view.export(tmp_path / "out")
    web.close()
    with pytest.raises(onionskin.StateError, match="closed"):
        web.export(tmp_path / "out")


def test_a_copy_that_fails_names_the_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"a" * 8192)
    target.write_bytes(b"")
    with open(source, "rb") as read, open(target, "rb") as cannot_be_written:
        rows = [(read.fileno(), cannot_be_written.fileno(), 0, 0, 8192)]
        with pytest.raises(OSError, match=rf"in a copy from {source}: '{target}'"):
            copy.run_job(CopyJob(rows), None, 0, 0)
