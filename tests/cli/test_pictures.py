"""map and tree --output: what is written where, and that looking changes nothing."""

import json
import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import onionskin
from onionskin.cli.arguments import parse_name

Run = Callable[..., Result]
MIB = 1 << 20
MAP_KEYS = {"volume", "snapshot", "size_bytes", "columns", "hole_bytes", "zero_bytes", "layers", "cells"}


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def vms(tmp_path: Path) -> Path:
    """A store with a volume web of 8 MiB: a MiB of the base, of snapshot old, of the head, zeros, and holes."""
    with (tmp_path / "base.raw").open("wb") as base:
        base.truncate(8 * MIB)
        base.write(os.urandom(4 * MIB))
    with (
        onionskin.Store(tmp_path / "vms") as store,
        store.create("web", base=tmp_path / "base.raw") as web,
    ):
        web.write(MIB, os.urandom(MIB))
        web.snapshot("old")
        web.write(2 * MIB, os.urandom(MIB))
        web.zero(3 * MIB, MIB)
    return tmp_path / "vms"


def in_rows(text: str) -> list[str]:
    """The letters of the cells, without the offsets beside them."""
    return [line.rpartition("  ")[2] for line in text.split("\n\n")[0].splitlines()[1:]]


def test_the_map_is_letters_where_it_is_piped(run: Run, vms: Path) -> None:
    shown = ok(run("map", f"{vms}/web", "--columns", 8, "--rows", 2))
    assert in_rows(shown) == ["==BBAA00", "........"]
    assert "A  web (head)" in shown
    assert "B  web@old" in shown
    assert re.search(r"reads zero.* 1 MiB", shown)
    assert re.search(r"hole.* 4 MiB", shown)
    assert "\x1b" not in shown


def test_the_map_of_a_snapshot_is_as_the_disk_was(run: Run, vms: Path) -> None:
    assert in_rows(ok(run("map", f"{vms}/web@old", "--columns", 8, "--rows", 1))) == ["=A==...."]


def test_the_map_as_json(run: Run, vms: Path) -> None:
    value = json.loads(ok(run("map", f"{vms}/web", "--columns", 4, "--rows", 2, "--json")))
    assert set(value) == MAP_KEYS
    assert (value["volume"], value["snapshot"], value["size_bytes"], value["columns"]) == ("web", None, 8 * MIB, 4)
    assert (value["hole_bytes"], value["zero_bytes"]) == (4 * MIB, MIB)
    assert [(layer["depth"], layer["kind"], layer["bytes"]) for layer in value["layers"]] == [
        *((0, "head", MIB), (1, "snapshot", MIB), (2, "base", MIB)),
    ]
    assert set(value["layers"][0]) == {"depth", "kind", "name", "created", "bytes"}
    assert [(cell["state"], cell["depth"]) for cell in value["cells"]] == [
        *(("data", 2), ("data", 1), ("data", 0), ("zero", 0)),
        *[("hole", None)] * 4,
    ]
    assert value["cells"][1] == {"offset": MIB, "length": MIB, "state": "data", "depth": 1, "share": 1.0}


def test_the_suffix_says_which_picture_is_written(run: Run, vms: Path, tmp_path: Path) -> None:
    assert ok(run("map", f"{vms}/web", "-o", tmp_path / "map.svg")) == f"wrote {tmp_path}/map.svg\n"
    ElementTree.parse(tmp_path / "map.svg")
    ok(run("map", f"{vms}/web", "--output", tmp_path / "map.PNG"))
    assert (tmp_path / "map.PNG").read_bytes().startswith(b"\x89PNG")
    ok(run("tree", vms, "--output", tmp_path / "tree.svg"))
    assert "web@old" in (tmp_path / "tree.svg").read_text()


def test_a_dash_writes_svg_and_nothing_else_to_stdout(run: Run, vms: Path) -> None:
    for words in (["map", f"{vms}/web"], ["tree", vms]):
        assert ElementTree.fromstring(ok(run(*words, "--output", "-"))).tag.endswith("svg")


def test_a_picture_and_json_can_be_had_at_once(run: Run, vms: Path, tmp_path: Path) -> None:
    assert set(json.loads(ok(run("map", f"{vms}/web", "--json", "-o", tmp_path / "map.svg")))) == MAP_KEYS
    assert json.loads(ok(run("tree", vms, "--json", "-o", tmp_path / "tree.svg")))[0]["kind"] == "base"
    assert (tmp_path / "map.svg").exists()
    assert (tmp_path / "tree.svg").exists()


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(run: Run, vms: Path, tmp_path: Path) -> None:
    result = run("map", f"{vms}/web", "-o", tmp_path / "none" / "map.svg")
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1


def test_a_disk_image_is_not_taken_for_a_picture(run: Run, vms: Path, tmp_path: Path) -> None:
    before = (tmp_path / "base.raw").read_bytes()
    assert run("map", f"{vms}/web", "-o", tmp_path / "base.raw").exit_code == 2
    assert (tmp_path / "base.raw").read_bytes() == before


def test_a_volume_that_is_held_is_mapped_as_it_was_flushed(run: Run, vms: Path) -> None:
    with onionskin.Store(vms) as store, store.open("web") as web:
        web.write(4 * MIB, os.urandom(MIB))
        web.flush()
        assert in_rows(ok(run("map", f"{vms}/web", "--columns", 8, "--rows", 1))) == ["=BA0A..."]


def on_terminal(term: str, *arguments: object, **environment: str) -> str:
    ours, its = pty.openpty()
    settings = os.environ | {"TERM": term, "COLUMNS": "60", "PYTHONUTF8": "1"} | environment
    if "NO_COLOR" not in environment:
        settings.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "onionskin", *map(str, arguments)], stdout=its, stderr=its, stdin=its, env=settings
    )
    os.close(its)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how a terminal says that its other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


@pytest.mark.slow
def test_a_terminal_gets_colours_and_one_without_them_letters(vms: Path) -> None:
    in_colour = on_terminal("xterm-256color", "map", f"{vms}/web", "--columns", 8, "--rows", 1)
    assert "\x1b[38;5;" in in_colour
    assert "█" in in_colour
    for shown in (
        on_terminal("dumb", "map", f"{vms}/web", "--columns", 8, "--rows", 1),
        on_terminal("xterm-256color", "map", f"{vms}/web", "--columns", 8, "--rows", 1, NO_COLOR="1"),
    ):
        assert "=BA0...." in shown
        assert "\x1b[38" not in shown


def commands_that_make(picture: str) -> list[Any]:
    manual = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    (command,) = re.findall(rf"^onionskin (.* --output {picture})$", manual, re.MULTILINE)
    return command.split()


@pytest.mark.parametrize("picture", ["map.svg", "tree.svg"])
def test_the_manual_shows_pictures_that_its_commands_make(
    run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch, picture: str
) -> None:
    shown = Path(__file__).parents[2] / "docs" / picture
    assert shown.stat().st_size < 30_000
    monkeypatch.chdir(vms.parent)
    words = commands_that_make(picture)
    assert parse_name(words[1] if "/" in words[1] else f"{words[1]}/web").store.name == "vms"
    ok(run(*words))
    made, kept = (path.read_text().splitlines()[2] for path in (vms.parent / picture, shown))
    assert made.startswith("<style>")
    assert made[:600] == kept[:600]
