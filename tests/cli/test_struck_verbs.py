"""Each verb that changes something, interrupted at calls that are spread over its run: all of it is done, or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from support import struck_verbs

from onionskin import Store, delta

BLOCK = 4096
VERBS = [
    "create {store}/new --size 1M",
    "snapshot {store}/web@new",
    "snapshot {store}/web@new {store}/over@new",
    "revert {store}/web@a --yes",
    "discard {store}/web@b --recursive --yes",
    "discard {store}/over@a..@b --yes",
    "merge {store}/web@a..@b",
    "merge {store}/web@a..",
    "clone {store}/web@a {store}/new",
    "fork {store}/web@a -n 3",
    "fork {store}/web -n 3",
    "fork {store}/web {store}/over -n 3",
    "expire {store}",
    "flatten {store}/old",
    "resize {store}/web 2M",
    "rename {store}/web www",
    "rename {store}/web@a z",
    "set {store}/over wipe=zero",
    "hold {store}/web@a..@c me",
    "unhold {store}/held@a..@b me",
    "note {store}/web@a text",
    "prune {store}/web --keep-last 1",
    "delete {store}/over {store}/old --recursive --yes",
    "trim {store}/web 0 64K",
    "import {files}/image {store}/new",
    "apply {store}/apart {files}/stream",
    "machine discard {store}/lab@x --recursive --yes",
    "machine delete {store}/lab --recursive --yes",
]
# What goes ways that the others go too, so it is struck only where there is time for all.
FURTHER = [
    "zero {store}/web 0 64K",
    "set {store}/over lifetime=2h",
    "machine create {store}/new --disk over --memory 1M",
    "machine snapshot {store}/lab@new",
    "machine fork {store}/lab@x -n 2 --no-start",
    "machine rename {store}/lab box",
    "machine merge {store}/lab@x",
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose volume `old` may be deleted by now, since its lifetime is over."""
    path = tmp_path_factory.mktemp("struck") / "store"
    with Store(path) as store:
        for name, snapshots in {"web": "abc", "over": "ab", "held": "ab"}.items():
            with store.create(name, size=1 << 20) as volume:
                for number, snapshot in enumerate(snapshots):
                    volume.write(number * 16 * BLOCK, snapshot.encode() * 2 * BLOCK)
                    volume.write(100 * BLOCK, snapshot.encode() * BLOCK)
                    volume.snapshot(snapshot)
                volume.write(number * 16 * BLOCK, b"h" * BLOCK)
        store.hold("held", ["a", "b"], "me")
        store.fork("web", "a", names=["old"], lifetime=0.001)
        store.create("disk", size=1 << 20).close()
        machine = store.create_machine("lab", disks=["disk"], memory="1M")
        for snapshot in "xy":
            with store.open("disk") as volume:
                volume.write(0, snapshot.encode() * 2 * BLOCK)
            machine.snapshot(snapshot)
        with store.create("apart", size=1 << 20) as volume:
            volume.write(0, b"c" * BLOCK)
            volume.snapshot("c")
        store.clone("apart", "c", "further")
        with store.open("further") as volume, (path.parent / "stream").open("wb") as stream:
            volume.write(0, b"further " * BLOCK)
            volume.snapshot("d")
            delta.delta(store, None, "apart@c", "further@d", stream)
        store.delete("further", recursive=True)
    (path.parent / "image").write_bytes(b"image" * BLOCK)
    return path


@pytest.fixture(scope="module")
def program() -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, struck_verbs.__file__]
    with subprocess.Popen(line, stdin=PIPE, stdout=PIPE, text=True, env=environment) as program:
        yield program
        program.stdin.close()


@pytest.fixture
def struck(template: Path, tmp_path: Path, program: "subprocess.Popen[str]") -> Callable[..., None]:
    """Interrupt a verb at parts of its run, and look at what it says and what it leaves."""

    def interrupt(verb: str, places: list[float], number: int = signal.SIGINT) -> None:
        given = {
            "template": str(template),
            "work": str(tmp_path),
            "words": verb.replace("{files}", str(template.parent)).split(),
            "places": places,
            "number": number,
        }
        print(json.dumps(given), file=program.stdin, flush=True)
        judge(json.loads(program.stdout.readline()), number)

    return interrupt


def judge(found: dict[str, Any], number: int) -> None:
    before, whole = found["before"], found["whole"]
    assert whole["status"] == 0, whole["err"]
    for run in found["struck"]:
        assert run["errors"] == []
        where = f"at event {run['at']}: {run['status']}, {run['out']!r}, {run['err']!r}"
        assert run["left"] in (before, whole["left"]), where
        if run["status"] == 0:
            assert run["left"] == whole["left"] and run["out"] and not run["err"], where
        elif run["status"] == -number:  # before the verb began, or killed anywhere
            assert number == signal.SIGKILL or (run["left"] == before and run["out"] == run["err"] == ""), where
        else:
            assert run["status"] == 128 + number, where
            said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            assert run["err"].splitlines()[-1].startswith(f"onionskin: {said}; "), where


def spread(count: int, begin: float = 0.0) -> list[float]:
    return [begin + (1 - begin) * (place + 0.5) / count for place in range(count)]


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_verb_does_all_or_nothing_and_says_that_it_was_cut_short(
    struck: Callable[..., None], verb: str
) -> None:
    struck(verb, [0.0, *spread(3, 0.4), 1.0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_another_signal_that_ends_a_command_does_as_an_interrupt(
    struck: Callable[..., None], hangup: None, number: int
) -> None:
    struck("merge {store}/web@a..@b", [*spread(3), 1.0], number)


def test_a_signal_when_all_is_printed_changes_nothing(struck: Callable[..., None]) -> None:
    struck("hold {store}/web@a..@c me", [1 - part / 2000 for part in range(12)])


MERGES = ["merge {store}/web --into-base", "merge {store}/web@a --into-base"]


@pytest.fixture
def struck_merge(tmp_path: Path, program: "subprocess.Popen[str]") -> Callable[..., None]:
    """Interrupt a merge into the base at parts of its run, look at what it leaves, and have it go on."""
    base, pristine, template = (tmp_path / name for name in ("base.raw", "pristine", "template"))
    base.write_bytes(bytes(range(256)) * (BLOCK // 2))
    shutil.copy2(base, pristine)

    def interrupt(verb: str, places: list[float], number: int = signal.SIGINT) -> None:
        with Store(template) as store, store.create("web", base=base) as volume:
            volume.write(0, b"a" * 8 * BLOCK)
            volume.trim(20 * BLOCK, BLOCK)
            if "@a" in verb:
                volume.snapshot("a")
            volume.write(4 * BLOCK, b"h" * 8 * BLOCK)
        given = {"template": str(template), "work": str(tmp_path), "words": verb.split(), "places": places}
        given |= {"number": number, "base": str(base), "pristine": str(pristine)}
        print(json.dumps(given), file=program.stdin, flush=True)
        found = json.loads(program.stdout.readline())
        judge(found, number)
        ((_, _, disks, _),) = found["before"].values()
        for run in found["struck"]:
            assert run["again"] == 0 and run["then"] == found["before"], run
            assert run["base"] == disks["a" if "@a" in verb else ""][0], run

    return interrupt


@pytest.mark.parametrize("verb", MERGES)
def test_an_interrupted_merge_into_the_base_changes_no_disk_and_goes_on(
    struck_merge: Callable[..., None], verb: str
) -> None:
    struck_merge(verb, [0.0, *spread(3, 0.4), 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("verb", MERGES)
def test_a_merge_into_the_base_that_is_ended_anywhere_changes_no_disk_and_goes_on(
    struck_merge: Callable[..., None], verb: str, number: int
) -> None:
    struck_merge(verb, [*spread(60), *spread(10, 0.99)], number)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, *FURTHER])
def test_a_verb_that_is_interrupted_anywhere_does_all_or_nothing(struck: Callable[..., None], verb: str) -> None:
    struck(verb, [*spread(100), *spread(10, 0.99)])
