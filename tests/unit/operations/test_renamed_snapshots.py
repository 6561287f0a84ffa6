"""A snapshot that another process renames while a verb acts on the name: the verb drops nothing that it was not asked for."""

import json
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import onionskin
from onionskin import StateError
from onionskin.cli import dropping as of_command_line
from onionskin.cli import keeping, losses
from onionskin.cli.app import onionskin as command_line
from onionskin.nbd.server import Limits, Server
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


Pruner = Callable[[onionskin.Store], object]


def by_the_command_line(store: onionskin.Store) -> None:
    done = CliRunner().invoke(command_line, ["prune", f"{store.path}/web", "--keep-last", "1"])
    raise StateError(done.stderr)


def through_a_server(store: onionskin.Store) -> None:
    server = Server(limits=Limits(), allow_revert=True, log=lambda line: None)
    try:
        server.exports.add_volume(store.path, "web")
        by_the_command_line(store)
    finally:
        server.close()


@pytest.mark.parametrize(
    "pruner", [lambda store: store.prune("web", keep_last=1), by_the_command_line, through_a_server]
)
def test_pruning_drops_no_snapshot_that_took_a_name_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruner: Pruner
) -> None:
    with onionskin.Store(tmp_path) as store, onionskin.Store(tmp_path) as other:
        with store.create("web", size="1M") as web:
            for name in ("a", "b"):
                web.snapshot(name)
        guids = {one.guid for one in store.snapshots("web")}
        found = prune.retained
        free = iter("cdef")

        def rename_between(*given: object, **named: object) -> object:
            kept = found(*given, **named)  # type: ignore[arg-type]
            first, second = (one.name for one in other.snapshots("web"))
            other.rename_snapshot("web", first, next(free))
            other.rename_snapshot("web", second, first)
            return kept

        monkeypatch.setattr(prune, "retained", rename_between)
        with pytest.raises(StateError, match="another snapshot"):
            pruner(store)
        assert {one.guid for one in store.snapshots("web")} == guids


def test_pruning_drops_none_where_the_last_was_renamed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path) as store, store.create("web", size="1M") as web:
        for name in ("a", "b", "c", "d"):
            web.snapshot(name)
        found = snapshots.unnamed_around

        def rename_between(*given: object) -> object:
            with suppress(onionskin.SnapshotNotFoundError):
                store.rename_snapshot("web", "c", "z")
            return found(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(snapshots, "unnamed_around", rename_between)
        with pytest.raises(onionskin.SnapshotNotFoundError):
            store.prune("web", keep_last=1)
        assert [one.name for one in web.snapshots] == ["a", "b", "z", "d"]


@pytest.mark.parametrize("way", ["library", "command", "server"])
def test_what_somebody_took_hold_of_meanwhile_is_kept_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with onionskin.Store(tmp_path) as store:
        with store.create("web", size="1M") as web:
            for name in ("a", "b", "c", "d"):
                web.snapshot(name)
        found = snapshots.unnamed_around

        def hold_between(*given: Any) -> object:
            with suppress(StateError):
                store.hold("web", "b", "backup")
            return found(*given)

        monkeypatch.setattr(snapshots, "unnamed_around", hold_between)  # asked for once it is known what is to go
        if way == "library":
            said = {one.snapshot: one.kept_by for one in store.prune("web", keep_last=1)}
        else:
            with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
                if way == "server":
                    server.exports.add_volume(store.path, "web")
                line = ["prune", f"{tmp_path}/web", "--keep-last", "1", "--json"]
                done = CliRunner().invoke(command_line, line)
            said = {one["snapshot"]: tuple(one["kept_by"]) for one in json.loads(done.stdout)}
        assert said == {"a": (), "b": ("held",), "c": (), "d": ("last",)}
        assert [one.name for one in store.snapshots("web")] == ["b", "d"]


@pytest.mark.parametrize("verb", ["merge", "discard", "revert", "hold", "unhold"])
@pytest.mark.parametrize("served", [False, True])
def test_what_was_chosen_on_the_command_line_is_not_another_snapshot_that_took_the_name(
    verb: str, served: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path) as store, onionskin.Store(tmp_path) as other:
        with store.create("web", size="1M") as web:
            for name in ("a", "b"):
                web.write(0, name.encode())
                web.snapshot(name)
        guids = {one.guid for one in store.snapshots("web")}
        if verb == "unhold":
            store.hold("web", "b", "me")
        home = keeping if "hold" in verb else of_command_line
        look = "find_snapshot" if verb == "revert" else "guids_of"
        found = getattr(home, look)

        def swap_behind(*given: Any) -> Any:
            chosen = found(*given)
            for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
                other.rename_snapshot("web", old, new)
            return chosen

        monkeypatch.setattr(home, look, swap_behind)
        server = Server(limits=Limits(), allow_revert=True, log=lambda line: None)
        try:
            if served:
                server.exports.add_volume(store.path, "web")
            options = {"discard": ["--yes"], "revert": ["--yes"], "hold": ["me"], "unhold": ["me"]}.get(verb, [])
            done = CliRunner().invoke(command_line, [verb, f"{tmp_path}/web@b", *options])
        finally:
            server.close()
        assert done.exit_code == 5 and "another snapshot" in done.stderr
        assert {one.guid for one in store.snapshots("web")} == guids
        assert [one.snapshot for one in store.holds("web")] == (["a"] if verb == "unhold" else [])
        assert store.open("web", mode="r")[:1] == b"b"


def test_what_was_agreed_to_be_deleted_is_not_another_volume_that_took_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path) as store, onionskin.Store(tmp_path) as other:
        for name in ("empty", "full"):
            store.create(name, size="1M").close()
        agree = losses.agree

        def rename_between(*given: Any, **named: Any) -> None:
            agree(*given, **named)
            other.rename("empty", "old")
            other.rename("full", "empty")

        monkeypatch.setattr(losses, "agree", rename_between)
        done = CliRunner().invoke(command_line, ["delete", f"{tmp_path}/empty", "--yes"])
        assert done.exit_code == 5 and "renamed meanwhile" in done.stderr
        assert sorted(store) == ["empty", "old"]
