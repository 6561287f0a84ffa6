"""A snapshot that fails after the barrier: the old head goes on, and owns what was written meanwhile."""

import errno
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.operations import seal

BLOCK = 4096


def fail_snapshot(volume: onionskin.Volume, monkeypatch: pytest.MonkeyPatch, *, meanwhile: Any) -> None:
    """Take a snapshot whose transaction fails when the heads are swapped already."""

    def fail(*arguments: object) -> None:
        meanwhile()
        raise OSError(errno.ENOSPC, "the catalog is full")

    with monkeypatch.context() as patch:
        patch.setattr(seal, "_write_layer", fail)
        with pytest.raises(OSError, match="the catalog is full"):
            volume.snapshot("failed")


@pytest.mark.parametrize("again", [False, True], ids=["reopened", "after another snapshot"])
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_a_volume_opens_after_a_snapshot_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool, again: bool
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=16 * BLOCK) as web:
            if prepared:
                web.snapshot("one")
                web.snapshot("two")
                store.finish_work()
            web.write(0, b"a" * BLOCK)
            fail_snapshot(web, monkeypatch, meanwhile=lambda: web.write(BLOCK, b"b" * BLOCK))
            web.flush()
        with store.open("web") as web:
            if again:
                web.snapshot("good")
                web.write(2 * BLOCK, b"c" * BLOCK)
            assert web.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        with store.open("web") as web:
            assert web.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
            assert web.read(2 * BLOCK, 1) == (b"c" if again else b"\0")
