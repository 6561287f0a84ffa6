"""Where the system gives no thread, a verb does all the same what it was asked for, and raises nothing when that is done."""

import threading
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096


def test_verbs_work_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.raw").write_bytes(b"base" * BLOCK)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    told: list[tuple[int, int]] = []
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", base=tmp_path / "base.raw") as web:
            for name in ("one", "two", "three"):
                web.write(0, name.encode())
                web.snapshot(name)
            web.merge("two")
            web.discard("three")
            web.revert("one")
            web.merge("one")
            web.export(tmp_path / "image.raw")
            web.merge_into_base(progress=lambda done, total: told.append((done, total)))
            web.write(BLOCK, b"more")
            web.flatten()
            assert web.read(0, 3) == b"one" and web.read(BLOCK, 4) == b"more"
        store.delete("web")
        store.finish_work()
        assert list(store._opened.layout.segments.iterdir()) == []
        assert store.check() == []
    assert (tmp_path / "image.raw").read_bytes()[:3] == b"one"
    assert (tmp_path / "base.raw").read_bytes()[:3] == b"one"
    assert told and told[-1][0] == told[-1][1]
