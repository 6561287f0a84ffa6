"""Eight processes fork and drop volumes of one store and are killed again and again: the store is what a model says."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.strays import strays

import onionskin
from onionskin.catalog import LineageRow

WORK = Path(__file__).with_name("forking_work.py")
BLOCK = 4096
PROCESSES = 8


@dataclass
class Fork:
    """What a volume reads at its second block, and what it comes from: (name, snapshot), the nearest first."""

    stamp: int
    ancestors: list[tuple[str, str | None]]


@dataclass
class Worker:
    """The volumes of one process after another, each of which is killed and goes on where the one before was."""

    store: onionskin.Store
    name: str
    forks: dict[str, Fork] = field(default_factory=dict)
    used: int = 0
    made: int = 0
    dropped: int = 0
    refused: list[str] = field(default_factory=list)

    def run_and_kill(self, seed: int, steps: int) -> None:
        """Let a process do so many things, and kill it at the next."""
        state = json.dumps({"names": list(self.forks), "used": self.used})
        child = subprocess.Popen(
            [sys.executable, WORK, self.store.path, self.name, state, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stderr is not None
        begun: dict[str, Any] | None = None
        with child, child.stdout, child.stderr:
            for said in self._said(child, steps):
                if "do" in said:
                    begun, self.used = said, said["used"]
                    continue
                assert begun is not None
                if said["done"] is None:
                    self.refused.append(said["why"])
                else:
                    self._apply(begun, said["done"])
                begun = None
            errors = child.stderr.read().decode()
        assert not errors, errors
        if begun:
            self._find_out(begun)
        assert self._there() == set(self.forks)

    @staticmethod
    def _said(child: "subprocess.Popen[bytes]", steps: int) -> Iterator[dict[str, Any]]:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.endswith(b"\n"):
                break  # it was killed while it said that
            steps -= 1
            if steps == 0:
                child.kill()
            yield json.loads(line)

    def _there(self) -> set[str]:
        return {name for name in self.store if name.startswith(f"{self.name}-")}

    def _find_out(self, begun: dict[str, Any]) -> None:
        """Whether what was under way was done: all of it, or nothing."""
        there, before = self._there(), set(self.forks)
        match begun["do"]:
            case "fork":
                assert there in (before, before | set(begun["names"]))
            case "fork numbered":
                assert before <= there and len(there - before) in (0, begun["count"])
            case "delete":
                assert there in (before, before - set(begun["names"]))
        if begun["do"] == "write":
            (name,) = begun["names"]
            stamp = stamp_of(self.store, name)
            assert stamp in (self.forks[name].stamp, begun["stamp"])
            self.forks[name].stamp = stamp
        elif there != before:
            self._apply(begun, sorted(there ^ before))

    def _apply(self, begun: dict[str, Any], names: list[str]) -> None:
        match begun["do"]:
            case "fork" | "fork numbered":
                self.made += len(names)
                volume, _, snapshot = begun["source"].partition("@")
                source = self.forks.get(volume, Fork(0, []))
                for name in names:
                    self.forks[name] = Fork(source.stamp, [(volume, snapshot or None), *source.ancestors])
            case "delete":
                self.dropped += len(names)
                for name in names:
                    del self.forks[name]
            case "write":
                self.forks[names[0]].stamp = begun["stamp"]

    def check(self) -> None:
        """Compare all that is left with the model."""
        for name, fork in self.forks.items():
            assert stamp_of(self.store, name) == fork.stamp
            assert [(one.name, one.snapshot) for one in self.store.lineage(name)] == fork.ancestors


def stamp_of(store: onionskin.Store, name: str) -> int:
    with store.open(name, mode="r") as disk:
        assert disk[:BLOCK] == b"a" * BLOCK
        assert disk[2 * BLOCK : 3 * BLOCK] in (b"w" * BLOCK, bytes(BLOCK))
        return int.from_bytes(disk[BLOCK : BLOCK + 8], "little")


def run(path: Path, *, kills: int, steps: int, seed: int) -> list[Worker]:
    with onionskin.Store(path) as store:
        with store.create("web", size=16 * BLOCK) as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("clean")
            # As long as the disk is what "clean" is, its forks come from "clean", whatever the model says.
            web.write(2 * BLOCK, b"w" * BLOCK)
        workers = [Worker(store, f"w{number}") for number in range(PROCESSES)]

        def work(worker: Worker) -> None:
            draw = random.Random(f"{seed} {worker.name}")
            for _ in range(kills):
                worker.run_and_kill(draw.randrange(1 << 30), draw.randint(2, 2 * steps))

        with ThreadPoolExecutor(PROCESSES) as threads:
            list(threads.map(work, workers))
        for worker in workers:
            worker.check()
        assert [problem for problem in store.check() if problem.severity == "error"] == []
        assert set(store) == {"web"}.union(*(worker.forks for worker in workers))
        left = [name for name in store if name != "web"]
        if left:
            store.delete(*left)
    assert all("web" in why for worker in workers for why in worker.refused)
    check_that_only_web_is_left(path)
    return workers


def check_that_only_web_is_left(path: Path) -> None:
    """Its chain is as long as it was before there were forks, and nothing else is left of them."""
    for _ in range(2):
        with onionskin.Store(path) as store, store.open("web") as web:
            assert web[:BLOCK] == b"a" * BLOCK
    with onionskin.Store(path) as store:
        assert store.check() == [] and store.forks_of("web") == []
        assert len(store._opened.catalog.layers_of_volume(store._opened.catalog.volume("web").id)) == 2
        assert len(store._opened.catalog.all_sound(LineageRow)) == 1
    assert strays(path) == []


def test_processes_that_fork_and_delete_and_are_killed_leave_what_the_model_says(tmp_path: Path) -> None:
    workers = run(tmp_path / "store", kills=2, steps=16, seed=1)
    assert sum(worker.made for worker in workers) > 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_forks_and_drops_of_killed_processes_leave_what_the_model_says(tmp_path: Path) -> None:
    workers = run(tmp_path / "store", kills=30, steps=90, seed=2)
    assert sum(worker.made + worker.dropped for worker in workers) > 10_000
