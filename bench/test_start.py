"""A verb of the command line as a process, against the start of Python with what every verb needs.

The goal is the time of ``python -c 'import click, sqlite3'`` and 20 ms.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from rig.race import CLOCK, Race, Setting, run_race

import onionskin
from onionskin.measure.timing import Contestant

START = "python -c 'import click, sqlite3'"
VERBS = ("snapshots", "list", "tree", "info", "snapshot", "diff", "export", "flatten")


@pytest.fixture(scope="module")
def race(setting: Setting) -> Iterator[Race]:
    directory, names = setting.directory / "store", count()
    with onionskin.Store(directory) as store, store.create("web", size="64M") as web:
        for name in ("a", "b", "c"):
            web.write(0, name.encode())
            web.snapshot(name)
        web.write(0, b"d")

    def run(*words: object) -> None:
        subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)

    def clone() -> Path:
        name = f"copy{next(names)}"
        with onionskin.Store(directory) as store:
            store.clone("web", "a", name)
        return directory / name

    def verb(name: str) -> Contestant:
        program = Path(sys.executable).with_name("onionskin")
        if name == "snapshot":
            return Contestant(lambda: run(program, name, f"{directory}/web@s{next(names)}"))
        if name == "diff":
            return Contestant(lambda: run(program, name, f"{directory}/web@a"))
        if name == "export":
            return Contestant(
                lambda: run(program, name, f"{directory}/web@a", setting.directory / f"{next(names)}.img")
            )
        if name == "flatten":
            return Contestant(lambda copy: run(program, name, copy), prepare=clone)
        return Contestant(lambda: run(program, name, directory if name in ("list", "tree") else directory / "web"))

    contestants: dict[str, Contestant | str] = {START: Contestant(lambda: run("-c", "import click, sqlite3"))}
    contestants |= {name: verb(name) for name in VERBS}
    yield run_race(contestants, max(5, setting.rounds), engine=START)


@pytest.mark.benchmark(group="start", timer=CLOCK)
@pytest.mark.parametrize("member", [START, *VERBS])
def test_start(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)
