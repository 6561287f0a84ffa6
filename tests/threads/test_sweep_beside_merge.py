"""The sweep of files without a row must not take those that a merge in another thread is about to name."""

import threading
from pathlib import Path

import pytest

import onionskin
from onionskin import pending

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
