"""One catalog in several processes: what one of them commits, all see, whoever else has come and gone."""

import subprocess
import sys
from pathlib import Path

import pytest

import onionskin

NAMES = "import sys, onionskin; print(*(s.name for s in onionskin.Store(sys.argv[1]).snapshots('web')))"


def names_in_another_process(store: Path) -> list[str]:
    ended = subprocess.run([sys.executable, "-c", NAMES, store], capture_output=True, text=True, check=True)
    return ended.stdout.split()


def test_commits_are_not_lost_when_another_process_closes_the_store(tmp_path: Path) -> None:
    # SQLite's locks are the process's: were another descriptor of its file closed here, they would be gone, and the
    # other process, thinking itself alone, would remove the log that this one goes on writing to.
    with onionskin.Store(tmp_path) as store, store.create("web", size="1M") as web:
        web.snapshot("a")
        assert names_in_another_process(tmp_path) == ["a"]
        with onionskin.Store(tmp_path) as second, second.create("db", size="1M"):
            pass
        web.snapshot("b")
        assert names_in_another_process(tmp_path) == ["a", "b"]
    assert names_in_another_process(tmp_path) == ["a", "b"]


def test_a_lock_byte_that_a_failed_transaction_took_is_not_handed_out_again(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        taken: list[int] = []
        with pytest.raises(KeyboardInterrupt), store._opened.catalog.transaction():
            taken.append(store._opened.catalog.take_lock_byte())
            raise KeyboardInterrupt
        with store._opened.catalog.transaction():
            assert store._opened.catalog.take_lock_byte() > taken[0]
