"""The sweep of files without a row must not take those that another thread, or another store, is about to name."""

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import onionskin
from onionskin import pending
from onionskin.locks import STORE_BYTE

BLOCK = 4096


def test_a_sweep_waits_for_whoever_makes_files_without_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    orphans = pending.orphans

    def look(store: onionskin.Store) -> list[Path]:
        looked.set()
        return orphans(store)

    with onionskin.Store(tmp_path / "store") as store:
        store.create("db", size=BLOCK).close()
        monkeypatch.setattr(pending, "orphans", look)
        opener = threading.Thread(target=lambda: store.open("db").close())
        with store.unnamed_files:
            draft = store.layout.map_file(bytes(16))
            draft.write_bytes(b"not yet named")
            opener.start()
            assert not looked.wait(0.3)
            assert draft.exists()
        opener.join()
        assert looked.is_set()
        assert not draft.exists()


def test_a_store_that_is_opened_during_a_sweep_keeps_the_next_one_away(tmp_path: Path) -> None:
    with ExitStack() as opened:
        first = opened.enter_context(onionskin.Store(tmp_path / "store"))
        opener = threading.Thread(target=lambda: opened.enter_context(onionskin.Store(tmp_path / "store")))
        with first.locks.exclusive(STORE_BYTE) as sweeping:
            assert sweeping
            opener.start()
            opener.join(0.3)
        opener.join()
        with first.locks.exclusive(STORE_BYTE) as sweeping:
            assert not sweeping
