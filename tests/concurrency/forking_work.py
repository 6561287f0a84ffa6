"""Forks and drops volumes until it is killed, for the test that kills it: `forking_work.py STORE NAME STATE SEED`.

STATE says, as JSON, what its volumes are called, and how many names it has used. It says on a line what it is about to do,
and on the next one what became of that: so whoever kills it knows what it was at.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import onionskin

BLOCK = 4096
FORKS_MAX = 12


class Work:
    """What one process does to a store; no other one touches its volumes."""

    def __init__(self, store: onionskin.Store, name: str, state: dict[str, Any], seed: int) -> None:
        self.store, self.name, self.random = store, name, random.Random(seed)
        self.names: list[str] = state["names"]
        self.used: int = state["used"]

    def say(self, **what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def new_name(self) -> str:
        self.used += 1
        return f"{self.name}-{self.used}x"

    def source(self) -> str:
        return self.random.choice(["web@clean", "web", *self.names[-3:]])

    def fork(self) -> list[str]:
        source, names = self.source(), [self.new_name() for _ in range(self.random.randint(1, 3))]
        self.say(do="fork", source=source, names=names, used=self.used)
        return self.store.fork(source, names=names, labels={"of": self.name}, lifetime="1h")

    def fork_numbered(self) -> list[str]:
        source, count = self.source(), self.random.randint(1, 3)
        self.say(do="fork numbered", source=source, count=count, used=self.used)
        return self.store.fork(source, count=count, pattern=f"{self.name}-{{n}}n")

    def delete(self) -> list[str]:
        names = self.random.sample(self.names, self.random.randint(1, len(self.names)))
        self.say(do="delete", names=names, used=self.used)
        self.store.delete(*names)
        return names

    def write(self) -> list[str]:
        name, stamp = self.random.choice(self.names), self.random.randrange(1, 1 << 60)
        self.say(do="write", names=[name], stamp=stamp, used=self.used)
        with self.store.open(name) as disk:
            disk.write(BLOCK, stamp.to_bytes(8, "little"))
        return [name]

    def write_web(self) -> list[str]:
        self.say(do="write web", used=self.used)
        with self.store.open("web") as web:
            web.write(2 * BLOCK, b"w" * BLOCK)
        return []

    def step(self) -> None:
        verbs = [self.fork, self.fork_numbered, self.write_web]
        if self.names:
            verbs += [self.write, self.delete]
        if len(self.names) > FORKS_MAX:
            verbs = [self.delete]
        verb = self.random.choice(verbs)
        try:
            names = verb()
        except onionskin.StateError as error:  # another process holds web
            self.say(done=None, why=str(error))
            return
        self.say(done=names)
        if verb in (self.fork, self.fork_numbered):
            self.names += names
        elif verb == self.delete:
            self.names = [name for name in self.names if name not in names]


def main() -> None:
    """Work until somebody ends this."""
    root, name, state, seed = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    with onionskin.Store(root) as store:
        work = Work(store, name, state, seed)
        while True:
            work.step()


if __name__ == "__main__":
    main()
