"""Two processes that have one store open at once see each other's changes, and neither takes the catalog from the other."""

import subprocess
import sys
from pathlib import Path

import onionskin

OTHER = """
import sys, onionskin
with onionskin.Store(sys.argv[1]) as store:
    with store.open("db") as db:
        db.snapshot("other")
    print([snapshot.name for snapshot in store.snapshots("web")])
"""


def other_process(store: onionskin.Store) -> str:
    ended = subprocess.run([sys.executable, "-c", OTHER, store.path], check=True, capture_output=True, text=True)
    return ended.stdout.strip()


def test_a_process_that_closes_the_store_leaves_the_log_of_the_catalog_to_the_other(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("db", size=4096).close()
        with store.create("web", size=4096) as web:
            log = store._opened.layout.catalog.with_name("catalog.db-wal")
            before = log.stat().st_ino
            web.snapshot("a")
            assert other_process(store) == "['a']"
            assert log.stat().st_ino == before
            web.snapshot("b")
            assert [snapshot.name for snapshot in store.snapshots("db")] == ["other"]
    with onionskin.Store(tmp_path / "store") as store:
        assert [snapshot.name for snapshot in store.snapshots("web")] == ["a", "b"]
