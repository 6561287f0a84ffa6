"""After a clean close the map of a head is known: damage to it is reported, and nothing that looks makes it worse."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin

SIZE = 1 << 20
BLOCK = 4096
DAMAGED = 6


def cut(path: Path) -> None:
    """Inside its one frame: behind that the file is as long as it was allocated."""
    path.write_bytes(path.read_bytes()[: BLOCK + 60])


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[BLOCK + 40] ^= 1
    path.write_bytes(contents)


HARMS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "one bit flipped": flip,
}


@pytest.fixture
def closed(tmp_path: Path) -> tuple[Path, Path]:
    """A store that was closed cleanly, and the map of the head in it."""
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=SIZE, wipe="zero") as web:
        web.write(0, b"1" * 3 * BLOCK)
        web.snapshot("a")
        web.write(BLOCK, b"2" * 3 * BLOCK)
        web.close()
        return store.path, store._opened.layout.map_file(
            store._opened.catalog.layer(store._opened.catalog.volume("web").head).map_id
        )


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for kind in ("segments", "layers") for path in (store / kind).iterdir()}


LOOKS = {
    "open": lambda store: store.open("web").close(),
    "read": lambda store: store.open("web", mode="r").close(),
    "diff": lambda store: store.diff("web", "a"),
    "usage": lambda store: store.usage("web"),
    "check": lambda store: store.check(),
    "clone": lambda store: store.clone("web", "a", "clone"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_head_whose_map_was_damaged_is_not_opened_and_loses_nothing_by_looking(
    closed: tuple[Path, Path], harm: Callable[[Path], None]
) -> None:
    path, head_map = closed
    good = head_map.read_bytes()
    harm(head_map)
    before = files_of(path)
    for name, look in LOOKS.items():
        opens = name in ("open", "read")
        refused = pytest.raises(onionskin.FormatError) if opens else contextlib.suppress(onionskin.FormatError)
        with onionskin.Store(path) as store:
            with refused:
                look(store)
            store.finish_work()
        after = files_of(path)
        assert {name: after.get(name) for name in before} == before, name
    with onionskin.Store(path) as store:
        assert any(problem.severity == "error" for problem in store.check())
    head_map.write_bytes(good)
    with onionskin.Store(path) as store:
        with store.open("web") as web:
            assert web.read(0, 5 * BLOCK) == b"1" * BLOCK + b"2" * 3 * BLOCK + bytes(BLOCK)
        assert [problem for problem in store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_the_command_line_says_that_a_head_is_damaged(closed: tuple[Path, Path], harm: Callable[[Path], None]) -> None:
    path, head_map = closed
    harm(head_map)
    command = [sys.executable, "-m", "onionskin", "read", f"{path}/web", "0", "4096"]
    ended = subprocess.run(command, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (DAMAGED, b"")
    assert str(head_map).encode() in ended.stderr
