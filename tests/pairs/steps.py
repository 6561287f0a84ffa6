"""Steps: where a thread of the engine can be held, and the conductor that holds and lets go.

steps.c makes file operations, locks, waits and sleeps steps; here the statements of the catalog become steps too, by
a connection that says what it is about to run. The engine has no hook of its own.

What must hold: a process whose threads are to be conducted is forked from one in which `preloaded()` holds, after
`Conductor` was made there. Only `resume` lets a thread go on; `settle` returns when none runs.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import select
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("steps.c")
RECORD = struct.Struct("<iiiiq104s")
FREE = 1 << 60  # a limit that no actor reaches
UNSYNCED = -1  # told to a thread at a COMMIT: all of it is written, and its sync fails
STALL_SECONDS = 0.5  # how long a thread may run without a step before somebody looks whether it runs


class NotPreloadedError(Exception):
    """The process does not run under steps.c."""


def build() -> Path:
    """Compile steps.c, once for each version of it."""
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"onionskin-steps-{os.getuid()}-{version}.so"
    if not target.exists():
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            compiler = ["cc"]
        options = [
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fvisibility=hidden",
            "-shared",
            "-fPIC",
            "-pthread",
        ]
        staged = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, *options, "-o", staged, SOURCE, "-ldl"], check=True)
        staged.replace(target)
    return target


def library() -> ctypes.CDLL:
    """Return what was preloaded."""
    loaded = ctypes.CDLL(None)
    if not hasattr(loaded, "pairs_begin"):
        raise NotPreloadedError("this process does not run under steps.c")
    loaded.pairs_begin.restype = ctypes.c_void_p
    loaded.pairs_count.restype = ctypes.c_int64
    loaded.pairs_set_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    loaded.pairs_guard.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def preloaded() -> bool:
    """Return whether this process runs under steps.c."""
    return hasattr(ctypes.CDLL(None), "pairs_begin")


# ---- in the processes that are conducted ----


class _Announced(threading.local):
    """What this thread is about to ask of the catalog was a step already; `error` is what it has to fail with."""

    is_set = False
    error = 0


_announced = _Announced()
_LIBRARY: Any = None
# Of onionskin.catalog.Catalog: each takes its guard, and a thread that is held must not hold that.
GUARDED = ("_select", "has", "count", "chain", "reading", "transaction", "sync_found")

_ASKING = ("_select", "has", "count")


class SteppedConnection(sqlite3.Connection):
    """A connection whose statements are steps: all that change something, and those that begin to read."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        word = (statement.split(None, 1) or [""])[0].upper()
        if _LIBRARY is None or word == "ROLLBACK" or (word in ("SELECT", "WITH") and self.in_transaction):
            return super().execute(statement, *values)
        error = _announced.error if _announced.is_set else _LIBRARY.pairs_step(_label_of(statement).encode())
        _announced.is_set = False
        if error and word == "COMMIT":
            # As SQLite would meet it: its own write to the log fails, or the sync behind all of them.
            fail = _LIBRARY.pairs_fail_catalog_sync if error == UNSYNCED else _LIBRARY.pairs_fail_catalog
            fail(errno.EIO if error == UNSYNCED else error)
            try:
                return super().execute(statement, *values)
            finally:
                fail(0)
        if error:
            raise _sqlite_error(error)
        return super().execute(statement, *values)


def _announcing(name: str, method: Any) -> Any:
    """Make a call of the catalog a step before it takes the catalog's guard."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self._connection.in_transaction:
            what = [getattr(argument, "__name__", argument) for argument in arguments[:2]] if name in _ASKING else []
            label = " ".join(str(part) for part in ("catalog:", name.strip("_"), *what))
            _announced.error = _LIBRARY.pairs_step(label[:90].encode())
            _announced.is_set = True
        return method(self, *arguments, **options)

    return call


def _label_of(statement: str) -> str:
    text = " ".join(statement.split())
    if " FROM " in text and text.startswith("SELECT"):
        text = "SELECT .. FROM " + text.split(" FROM ", 1)[1]
    return f"catalog: {text}"[:90]


def _sqlite_error(number: int) -> sqlite3.OperationalError:
    full = number in (errno.ENOSPC, errno.EDQUOT)
    error = sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_IOERR
    error.sqlite_errorname = "SQLITE_FULL" if full else "SQLITE_IOERR"
    return error


def step_the_catalog() -> None:
    """Make the connections of this process, and of those forked from it, say their statements."""
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = library()
        plain = sqlite3.connect

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            return plain(*arguments, **{"factory": SteppedConnection, **options})

        sqlite3.connect = connect  # type: ignore[assignment]
        from onionskin.catalog import Catalog

        for name in GUARDED:
            if hasattr(Catalog, name):
                setattr(Catalog, name, _announcing(name, getattr(Catalog, name)))


@contextmanager
def as_actor(number: int) -> Iterator[None]:
    """Count the steps of this thread, and of threads that it makes, as those of an actor."""
    _LIBRARY.pairs_enter(number)
    try:
        yield
    finally:
        _LIBRARY.pairs_leave()


@contextmanager
def unseen() -> Iterator[None]:
    """What is done here is no step."""
    actor = _LIBRARY.pairs_pause()
    try:
        yield
    finally:
        _LIBRARY.pairs_resume(actor)


def note(text: str) -> None:
    """Tell the conductor something, without waiting."""
    _LIBRARY.pairs_note(text.encode())


def step(label: str) -> None:
    """Make a step between two calls of the engine."""
    _LIBRARY.pairs_step(label.encode())


# ---- in the process that conducts ----


@dataclass(slots=True)
class Thread:
    """A thread of an actor. state: `runs`, `parked` (at a step), `blocked`, `got` (what it waited for), `sleeps`."""

    slot: int
    actor: int
    process: int
    state: str
    number: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """What a thread told, in the order of all that was told."""

    actor: int
    text: str


class Conductor:
    """Holds the threads of actors at their steps. One for a process; `reset` before each run."""

    def __init__(self) -> None:
        step_the_catalog()
        self._library = library()
        self._reports, write_end = os.pipe()
        os.set_inheritable(write_end, True)
        self._library.pairs_begin(write_end)
        self.threads: dict[int, Thread] = {}
        self.notes: list[Note] = []
        self.trace: list[tuple[int, int, str]] = []  # actor, number, label of each step
        self._half = b""

    def reset(self, root: Path) -> None:
        """Forget all threads. Steps are calls on files below `root`."""
        while select.select([self._reports], [], [], 0)[0]:
            os.read(self._reports, 1 << 16)
        self._library.pairs_reset(os.fsencode(root))
        self.threads, self.notes, self.trace, self._half = {}, [], [], b""

    def set_trace(self, wanted: bool) -> None:
        """Whether steps that are passed are written down too."""
        self._library.pairs_set_trace(int(wanted))

    def limit(self, actor: int, steps: int) -> None:
        """Hold an actor's threads from its step of this number on."""
        self._library.pairs_set_limit(actor, steps)

    def count(self, actor: int) -> int:
        """Return how many steps an actor has come to."""
        return int(self._library.pairs_count(actor))

    def of(self, actor: int) -> list[Thread]:
        """Return an actor's threads."""
        return [thread for thread in self.threads.values() if thread.actor == actor]

    def resume(self, thread: Thread, error: int = 0) -> None:
        """Let a thread go on; with `error` its step fails."""
        thread.state = "runs"
        self._library.pairs_go(thread.slot, error)

    def forget_process(self, process: int) -> None:
        """Forget the threads of a process that is gone."""
        self.settle(0.0)
        self.threads = {slot: thread for slot, thread in self.threads.items() if thread.process != process}

    def settle(self, seconds: float = STALL_SECONDS) -> bool:
        """Wait until no thread runs; False if one still did after so long without anybody saying anything."""
        while True:
            runs = any(thread.state == "runs" for thread in self.threads.values())
            if not select.select([self._reports], [], [], seconds if runs else 0)[0]:
                return not runs
            self._take(os.read(self._reports, RECORD.size * 512))

    def wait_for_any(self, seconds: float) -> None:
        """Wait until somebody says something."""
        if select.select([self._reports], [], [], seconds)[0]:
            self._take(os.read(self._reports, RECORD.size * 512))

    def _take(self, data: bytes) -> None:
        data = self._half + data
        whole = len(data) // RECORD.size * RECORD.size
        self._half = data[whole:]
        for kind, slot, actor, process, number, raw in RECORD.iter_unpack(data[:whole]):
            label = raw.split(b"\0", 1)[0].decode(errors="replace")
            self._take_one(chr(kind), slot, actor, process, number, label)

    def _take_one(self, kind: str, slot: int, actor: int, process: int, number: int, label: str) -> None:
        if kind == "N":
            self.notes.append(Note(actor, label))
        elif kind == "E":
            self.threads.pop(slot, None)
        elif kind == "T":
            self.trace.append((actor, number, label))
        elif kind == "C":
            self.threads[slot] = Thread(slot, actor, process, "runs")
        elif slot in self.threads:
            thread = self.threads[slot]
            thread.state = {"P": "parked", "B": "blocked", "U": "got", "S": "sleeps"}[kind]
            thread.label = label
            if kind == "P":
                thread.number = number
                self.trace.append((actor, number, label))
