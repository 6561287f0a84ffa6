"""A check looks at files for a while after it has read the rows, and others go on meanwhile."""

from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.catalog import new_id
from onionskin.errors import StateError
from onionskin.operations import check


def left_of_head(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, head: bytes | None) -> list[str]:
    """Return what a check says of a head that a killed process left, where the rows say that it is this one."""
    monkeypatch.setattr(check, "has_unflushed", lambda store, volume: True)
    rows = check._read_rows(store._opened)
    if head is not None:
        rows.volumes[:] = [row._replace(head=head) for row in rows.volumes]
    return [problem.what for problem in check._check_left(store._opened, rows)]


def test_a_head_that_others_replaced_since_the_rows_were_read_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        assert left_of_head(store, monkeypatch, new_id()) == []


def test_files_that_another_process_wipes_now_are_no_problem_and_a_refused_opening_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()

        def refuse(*given: Any, **named: Any) -> None:
            raise StateError("it is of another boot")

        monkeypatch.setattr(type(store._opened), "open_layer", refuse)
        assert left_of_head(store, monkeypatch, None) == ["volume 'web' cannot be opened: it is of another boot"]
        monkeypatch.undo()
        monkeypatch.setattr("onionskin.storage.locks.ByteLocks.take_shared", lambda *given: False)
        monkeypatch.setattr("onionskin.storage.chain.LOCK_WAIT_SECONDS", 0)
        assert left_of_head(store, monkeypatch, None) == []
