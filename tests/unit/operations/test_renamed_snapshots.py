"""A snapshot that another process renames while a verb acts on the name: the verb drops nothing that it was not asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin
from onionskin import StateError
from onionskin.operations import prune, snapshots

VERBS: dict[str, Callable[[onionskin.Volume], object]] = {
    "merge": lambda volume: volume.merge("a"),
    "discard": lambda volume: volume.discard("a", recursive=True),
    "revert": lambda volume: volume.revert("a"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_goes_to_another_snapshot_meanwhile_drops_neither(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path) as store, onionskin.Store(tmp_path) as other, store.create("web", size="1M") as web:
        for name in ("a", "b"):
            web.write(0, name.encode())
            web.snapshot(name)
        web.write(0, b"head")
        found = snapshots.unnamed_around

        def rename_between(*given: object) -> object:
            other.rename_snapshot("web", "a", "c")
            other.rename_snapshot("web", "b", "a")
            return found(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(snapshots, "unnamed_around", rename_between)
        with pytest.raises(StateError, match="renamed meanwhile"):
            VERBS[verb](web)
        monkeypatch.undo()
        assert [one.name for one in web.snapshots] == ["c", "a"]
        assert web.read(0, 4) == b"head"


def test_pruning_drops_no_snapshot_that_took_a_name_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with onionskin.Store(tmp_path) as store, onionskin.Store(tmp_path) as other, store.create("web", size="1M") as web:
        for name in ("a", "b"):
            web.snapshot(name)
        found = prune.retained

        def rename_between(*given: object, **named: object) -> object:
            kept = found(*given, **named)  # type: ignore[arg-type]
            other.rename_snapshot("web", "a", "c")
            other.rename_snapshot("web", "b", "a")
            return kept

        monkeypatch.setattr(prune, "retained", rename_between)
        with pytest.raises(StateError, match="another snapshot"):
            prune.prune(web._opened.to_write(), prune.Rules(last=1), held=())
        assert [one.name for one in web.snapshots] == ["c", "a"]
