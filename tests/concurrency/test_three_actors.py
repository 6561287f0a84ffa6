"""Two processes and a server that one store is used by at once, in a random order, do what some order of it all explains."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from concurrency.three_actors_model import Event, Search, State, Volume
from concurrency.three_actors_work import BLOCK, BLOCKS, stamps_of
from support.servers import Serve, short_socket
from support.strays import strays

import onionskin

WORK = Path(__file__).with_name("three_actors_work.py")
TESTS = Path(__file__).parent.parent


class Run:
    """One run of three actors on a store, and what they said."""

    def __init__(
        self, root: Path, seed: int, steps: int, *, kills: int = 0, processes: str = "A B C", two: bool = False
    ) -> None:
        self.root, self.steps, self.kills = root, steps, kills
        self.processes, self.two_servers = processes.split(), two
        self.path = root / "store"
        self.guard = threading.Lock()
        self.random = random.Random(seed)
        self.events: dict[str, list[Event]] = {}
        self.number = 0

    def run(self) -> None:
        self.begin()
        servers = [Serve(*arguments, log=self.root / "log") for arguments in self.serve()]
        try:
            with ThreadPoolExecutor(3) as threads:
                ended = list(threads.map(self.act, self.processes, [self.random.randrange(1 << 20) for _ in "ABC"]))
        finally:
            status = [server.terminate() for server in servers]
        assert not any([*ended, *status]), (ended, status, (self.root / "log").read_text())
        log = (self.root / "log").read_text()
        assert "Traceback" not in log, log
        self.judge()

    def serve(self) -> list[list[object]]:
        more = ["--allow-revert", "--no-expire"]
        whole: list[object] = [self.path, "--socket", short_socket(self.root), *more]
        if not self.two_servers:
            return [whole]
        return [[self.path / "web", "--socket", short_socket(self.root).with_name("nbd-web"), *more], whole]

    def begin(self) -> None:
        (self.root / "base.img").write_bytes(bytes(BLOCKS * BLOCK))
        with onionskin.Store(self.path) as store:
            store.create("web", base=self.root / "base.img").close()
            store.create("db", size=BLOCKS * BLOCK, wipe=self.random.choice(("release", "zero"))).close()

    def act(self, names: str, seed: int) -> int:
        """Run the actors of a process, again where it is killed; returns how it ended."""
        draw = random.Random(seed)
        left = self.kills
        self.events |= {name: [] for name in names}
        while True:
            steps = self.steps // (self.kills + 1)
            kill_at = draw.randrange(2, 2 * steps) if left else 0
            ended = self.act_once(names, draw.randrange(1 << 20), steps, kill_at=kill_at)
            if ended != -signal.SIGKILL:
                return ended
            left -= 1

    def act_once(self, names: str, seed: int, steps: int, *, kill_at: int) -> int:
        child = subprocess.Popen(
            [sys.executable, WORK, self.path, short_socket(self.root), names, str(seed), str(steps)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        assert child.stdout is not None
        begun: dict[str, dict[str, Any]] = {}
        killed = 0
        with child:
            for count, line in enumerate(child.stdout):
                if not line.endswith(b"\n"):
                    break
                said = json.loads(line)
                if "op" in said:
                    begun[said["w"]] = said
                else:
                    self.note(said["w"], begun.pop(said["w"]), said)
                if kill_at and count == kill_at:
                    killed = time.monotonic_ns()
                    child.kill()
        if child.returncode == -signal.SIGKILL:
            for name in names:
                if name in begun:
                    self.note(name, begun[name], {"e": time.monotonic_ns(), "x": "gone"})
                self.note(name, {"b": killed, "op": ["died", name]}, {"e": time.monotonic_ns(), "r": None})
        elif begun:
            raise AssertionError(f"actors {names} ended in {begun}")
        return child.returncode

    def note(self, name: str, begun: dict[str, Any], ended: dict[str, Any]) -> None:
        outcome = {"gone": "maybe"}.get(ended.get("x", "done"), ended.get("x", "done"))
        op = tuple(begun["op"])
        with self.guard:
            self.number += 1
            event = Event(self.number, op, begun["b"], ended["e"], outcome, ended.get("r"), ended.get("why", ""))
            self.events[name].append(event)

    def judge(self) -> None:
        unforeseen = [e for events in self.events.values() for e in events if e.outcome in ("unexpected", "system")]
        assert not unforeseen, unforeseen
        found = self.look()
        initial = State(
            names={"web": "web", "db": "db"},
            volumes={name: Volume((0,) * BLOCKS) for name in ("web", "db")},
        )
        why = Search([*self.events.values(), found]).explain(initial)
        assert why is None, why

    def look(self) -> list[Event]:
        """Open all that is there, as the last one to do something, and look for what nothing names."""
        found: list[Event] = []

        def note(op: tuple[Any, ...], result: Any) -> None:
            self.number += 1
            now = time.monotonic_ns()
            found.append(Event(self.number, op, now, now, "done", result))

        with onionskin.Store(self.path) as store:
            note(("list",), sorted(store))
            for name in store:
                snaps = {}
                for snap in store.snapshots(name):
                    with store.open(name, snapshot=snap.name) as view:
                        snaps[snap.name] = stamps_of(view.read(0, BLOCKS * BLOCK))
                with store.open(name) as volume:
                    note(("found", name), [stamps_of(volume.read(0, BLOCKS * BLOCK)), snaps])
            store.finish_work()
            problems = [f"{one.what} ({one.where})" for one in store.check() if one.severity == "error"]
            assert problems == []
        assert strays(self.path) == []
        return found


@pytest.mark.parametrize("seed", range(2))
def test_two_processes_and_a_server_do_what_some_order_explains(tmp_path: Path, seed: int) -> None:
    Run(tmp_path, seed, 60).run()


def test_threads_a_process_and_two_servers_do_too(tmp_path: Path) -> None:
    Run(tmp_path, 2, 60, processes="AB C", two=True).run()


def test_processes_that_are_killed_meanwhile_do_too(tmp_path: Path) -> None:
    Run(tmp_path, 3, 60, kills=2).run()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 200))
def test_for_long_they_do_too(tmp_path: Path, seed: int) -> None:
    Run(tmp_path, seed, 150, kills=seed % 3, processes=["A B C", "AB C"][seed % 2], two=seed % 4 < 2).run()
