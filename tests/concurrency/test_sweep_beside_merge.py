"""Files are named before they are made: nobody may free those that another thread, or another store, is making."""

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.background import leave_work_to_the_test

import onionskin
from onionskin.operations import reclaim
from onionskin.operations.staging import staged_files
from onionskin.storage.locks import STORE_BYTE

BLOCK = 4096


def test_files_that_are_being_made_have_rows_and_nobody_frees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store, onionskin.Store(tmp_path / "store") as other:
        store.create("db", size=BLOCK).close()
        for one in (store, other):
            leave_work_to_the_test(one, monkeypatch)
        with staged_files(store._opened, ["map"], "release") as files:
            (row,) = files.rows
            staged = store._opened.layout.map_file(row.target)
            staged.write_bytes(b"not yet named")
            for one in (store, other):
                one.open("db").close()
                reclaim.remove_orphans(one._opened)
                assert reclaim.do_work(one._opened) == 1
            assert staged.exists()
        assert reclaim.do_work(other._opened) == 0
        assert not staged.exists(), "the block ended, and nobody kept the file"


def test_an_opening_touches_nothing_that_no_row_names(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("db", size=BLOCK).close()
        orphan, foreign = store._opened.layout.map_file(bytes(16)), store._opened.layout.segments / "notes.txt"
        for path in (orphan, foreign):
            path.write_bytes(b"somebody's")
        store.open("db").close()
        assert orphan.exists() and foreign.exists()
        assert store.check(repair=True) is not None
        assert not orphan.exists() and foreign.exists()


def test_a_store_that_is_opened_during_a_sweep_keeps_the_next_one_away(tmp_path: Path) -> None:
    with ExitStack() as opened:
        first = opened.enter_context(onionskin.Store(tmp_path / "store"))
        opener = threading.Thread(target=lambda: opened.enter_context(onionskin.Store(tmp_path / "store")))
        with first._opened.locks.exclusive(STORE_BYTE) as sweeping:
            assert sweeping
            opener.start()
            opener.join(0.3)
        opener.join()
        with first._opened.locks.exclusive(STORE_BYTE) as sweeping:
            assert not sweeping
