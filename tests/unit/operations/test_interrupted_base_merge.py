"""A merge into the base that was interrupted is ended before anything else happens to the volume or the base."""

import io
import os
from pathlib import Path

import pytest

import onionskin
from onionskin import delta, images
from onionskin.catalog import WorkRow
from onionskin.operations import copy, merge_into_base

BLOCK = 4096


@pytest.fixture
def web(tmp_path: Path):
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 64 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=base) as web:
        web.write(0, b"1" * 8 * BLOCK)
        web.snapshot("a")
        web.write(BLOCK, b"2" * 4 * BLOCK)
        interrupt_merge(web, "a")
        os.utime(base)
        os.link(base, tmp_path / "hard link")
        (tmp_path / "symlink").symlink_to(base)
        yield web


def interrupt_merge(web: onionskin.Volume, upto: str | None) -> None:
    """End a merge where it has written to the base and noted nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_into_base, "sync_file", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            web.merge_into_base(upto)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_nothing_else_changes_the_tree_meanwhile(web: onionskin.Volume) -> None:
    for change in (lambda: web.discard("a"), lambda: web.merge("a"), web.flatten, lambda: web.snapshot("b")):
        with pytest.raises(onionskin.StateError, match="merge into the base again"):
            change()


def test_where_data_is_can_be_seen_meanwhile(web: onionskin.Volume) -> None:
    extents = web.layering().extents.tolist()
    assert [(length // BLOCK, depth) for _, length, _, depth in extents] == [(1, 1), (4, 0), (3, 1), (56, 2)]


def test_merging_again_ends_it(web: onionskin.Volume, tmp_path: Path) -> None:
    before = web.read(0, web.size_bytes)
    web.merge_into_base("a")
    assert web.read(0, web.size_bytes) == before
    assert (tmp_path / "base.raw").read_bytes() == b"1" * 8 * BLOCK + b"b" * 56 * BLOCK
    assert web.store._opened.catalog.rows(WorkRow, "kind = 'base-merge'") == []


def test_an_interrupt_before_anything_is_copied_lets_the_volume_be_closed(web: onionskin.Volume) -> None:
    before = web.read(0, web.size_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_into_base, "_run_base_merge", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            web.merge_into_base("a")
    with web.store.open("web", snapshot="a"):  # the base can be read by others too
        pass
    web.merge_into_base("a")
    assert web.read(0, web.size_bytes) == before


def test_no_volume_is_made_over_a_base_that_is_half_merged(web: onionskin.Volume, tmp_path: Path) -> None:
    for name in ("base.raw", "hard link", "symlink"):
        with pytest.raises(onionskin.StateError, match="has not ended"):
            web.store.create("other", base=tmp_path / name)
    web.merge_into_base("a")
    web.store.create("other", base=tmp_path / "base.raw").close()


def test_opening_the_volume_leaves_the_base_alone_and_says_so(
    web: onionskin.Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = web.read(0, web.size_bytes)
    web.close()
    base = (tmp_path / "base.raw").stat()
    with web.store.open("web") as again:
        assert again.read(0, again.size_bytes) == before
        again.write(0, b"goes on")
        assert "merge --into-base" in caplog.text
    with web.store.open("web", snapshot="a") as view:
        assert view.read(0, BLOCK) == b"1" * BLOCK
    assert (tmp_path / "base.raw").stat().st_mtime_ns == base.st_mtime_ns


def test_the_disk_can_be_copied_out_meanwhile(web: onionskin.Volume, tmp_path: Path) -> None:
    before = web.read(0, web.size_bytes)
    web.export(tmp_path / "while it is open.raw")
    images.export_image(web, tmp_path / "while it is open.qcow2", format="qcow2")
    web.close()
    with web.store.open("web") as again:
        again.export(tmp_path / "opened again.raw")
    with web.store.open("web", mode="r") as read_only:
        read_only.export(tmp_path / "only read.raw")
    for name in ("while it is open", "opened again", "only read"):
        assert (tmp_path / f"{name}.raw").read_bytes() == before
    images.import_image(web.store, tmp_path / "while it is open.qcow2", "back")
    with web.store.open("back") as back:
        assert back.read(0, len(before)) == before


def test_a_snapshot_that_hides_what_was_merged_can_be_copied_out_meanwhile(
    web: onionskin.Volume, tmp_path: Path
) -> None:
    with web.store.open("web", snapshot="a") as view:
        before = view.read(0, view.size_bytes)
        view.export(tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == before
    stream = io.BytesIO()
    delta.delta(web.store, "web", None, "a", stream)
    assert stream.tell() > 64 * BLOCK


def test_a_copy_is_refused_if_somebody_else_writes_to_the_base_meanwhile(
    web: onionskin.Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_runs = copy.copy_runs

    def written_to(*arguments: object, **options: object) -> None:
        copy_runs(*arguments, **options)
        os.utime(tmp_path / "base.raw", (1, 1))

    monkeypatch.setattr(copy, "copy_runs", written_to)
    with pytest.raises(onionskin.ChainError, match="has changed"):
        web.export(tmp_path / "web.raw")
    assert not (tmp_path / "web.raw").exists()


def test_a_half_merged_base_is_not_called_damaged_when_it_is_verified(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 4 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", base=base, digest=True) as web:
            web.write(0, b"1" * BLOCK)
            interrupt_merge(web, None)
        with pytest.raises(onionskin.StateError, match="before the merge into it has ended"):
            store.open("web", verify=True)


@pytest.mark.parametrize("size_bytes", [None, 80 * BLOCK, 48 * BLOCK])
def test_a_half_merged_base_can_be_moved(tmp_path: Path, size_bytes: int | None) -> None:
    """The merge may have given the base another size already. Its time is another one in any case."""
    base, moved = tmp_path / "base.raw", tmp_path / "moved.raw"
    base.write_bytes(b"b" * 64 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", base=base) as web:
            if size_bytes:
                web.resize(size_bytes, force=True)
            web.write(0, b"1" * 8 * BLOCK)
            interrupt_merge(web, None)
            before = web.read(0, web.size_bytes)
        if size_bytes:
            os.truncate(base, size_bytes)  # where a merge that makes it smaller was killed at its end
        base.rename(moved)
        with pytest.raises(onionskin.StateError, match="say that you trust it"):
            store.relocate("web", base=moved)
        store.relocate("web", base=moved, trust=True)
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == before
            web.merge_into_base()
            assert web.read(0, web.size_bytes) == before
    assert moved.read_bytes() == before


def test_another_image_is_no_half_merged_base(web: onionskin.Volume, tmp_path: Path) -> None:
    (tmp_path / "other.raw").write_bytes(b"b" * 63 * BLOCK)
    with pytest.raises(onionskin.ChainError, match="another image"):
        web.store.relocate("web", base=tmp_path / "other.raw", trust=True)


def test_a_half_merged_base_that_was_moved_is_not_called_another_image(tmp_path: Path) -> None:
    base, moved = tmp_path / "base.raw", tmp_path / "moved.raw"
    base.write_bytes(b"b" * 4 * BLOCK)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", base=base, digest=True) as web:
            web.write(0, b"1" * BLOCK)
            interrupt_merge(web, None)
        base.rename(moved)
        with pytest.raises(onionskin.StateError, match="say that you trust it"):
            store.relocate("web", base=moved, verify=True)


def test_check_says_how_such_a_merge_is_ended(web: onionskin.Volume) -> None:
    (problem,) = web.store.check()
    assert "merge --into-base" in problem.advice


@pytest.mark.parametrize(
    "pace", [{"threads": 65}, {"threads": -1}, {"threads": 1 << 70}, {"bytes_per_second": 1 << 70}]
)
def test_a_pace_that_cannot_be_is_refused_before_a_merge_begins(tmp_path: Path, pace: dict[str, int]) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    with onionskin.Store(tmp_path / "store") as store, store.create("web", base=tmp_path / "base.raw") as web:
        web.write(0, b"written")
        with pytest.raises(ValueError, match="give"):
            web.merge_into_base(**pace)
        web.snapshot("goes on")
