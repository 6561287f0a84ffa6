"""Runs a program under the recorder and checks every state that a crash of it may leave.

    recording = run(program, root)                 # a command, or a function of the root
    report = check_states(recording, checker)      # checker(state_directory, markers) -> what is wrong with
    it assert not report.violations, report

A program marks what it has done with `mark(root, text)`, which is an ordinary write without the recorder. A
marker that a state carries was written after all calls before it had returned: what it acknowledges must be
there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash.harness.replay import (
    KINDS,
    SYNC_END,
    Entry,
    InitialFile,
    Marker,
    Plan,
    Replay,
    State,
    parked_name,
    parse_log,
)

RECORDER_SOURCE = Path(__file__).with_name("recorder.c")
MARK_NAME = ".crash-mark"
Checker = Callable[[Path, Sequence[str]], list[str]]


class ProgramError(Exception):
    """The program under test failed by itself."""


def mark(root: Path, text: str) -> None:
    """Puts a marker into the log. The recorder sees one write, so `text` is recorded whole."""
    descriptor = os.open(root / MARK_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def build_recorder() -> Path:
    """Compiles the recorder with the system's C compiler, once for each version of its source."""
    source = RECORDER_SOURCE.read_bytes()
    version = hashlib.sha256(source).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"onionskin-recorder-{os.getuid()}-{version}.so"
    if not target.exists():
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            compiler = ["cc"]
        unfinished = target.with_suffix(f".{os.getpid()}")
        options = [
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fvisibility=hidden",
            "-shared",
            "-fPIC",
        ]
        subprocess.run([*compiler, *options, "-pthread", "-o", unfinished, RECORDER_SOURCE], check=True)
        unfinished.replace(target)
    return target


@dataclass
class Recording:
    """What a program did to the files below `root`."""

    root: Path
    entries: list[Entry]
    truncated: bool
    initial: list[InitialFile]
    root_inode: tuple[int, int]
    output: str = field(repr=False)

    @property
    def barriers(self) -> int:
        """How many syncs returned."""
        return sum(entry.kind == SYNC_END for entry in self.entries)

    def replay(self) -> Replay:
        return Replay(self.entries, self.initial, self.root_inode)


def read_initial(root: Path) -> list[InitialFile]:
    """What is below the root before the program runs."""
    found = []
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        contents = b"" if path.is_dir() else path.read_bytes()
        inode = (state.st_dev, state.st_ino)
        found.append(InitialFile(str(path.relative_to(root)), inode, path.is_dir(), contents, state.st_mtime_ns))
    return found


def resume(
    recording: Recording, index: int, program: Sequence[str] | Callable[[Path], None], **options: Any
) -> Recording:
    """Kills the recorded program after `index` records, runs another on what it left, and records on.

    Nothing is made durable by the kill: the states of the result are those of a power loss during or after
    the second program, with all that the first had not synced still open. `options` as for `run`.
    """
    (left,) = recording.replay().states([Plan(index, "prefix")])
    carried = recording.replay().inodes(index)
    with StateDirectory(recording, None) as place:
        root = place.make(left)
        known = {inode_of(root / path): inode for path, inode in carried.items()}
        known[inode_of(root)] = recording.root_inode
        second = run(program, root, log=recording.root.with_name(recording.root.name + ".resumed.log"), **options)
    entries = [
        dataclasses.replace(
            entry,
            inode=known.get(entry.inode, (entry.inode[0] + RESUMED_DEVICE, entry.inode[1])),
            sync=-entry.sync,
        )
        for entry in second.entries
    ]
    # Syncs that the first program had begun never return.
    joined = [*recording.entries[:index], *entries]
    return Recording(recording.root, joined, second.truncated, recording.initial, recording.root_inode, second.output)


# Keeps the inodes of files that the second program makes apart from those of the first.
RESUMED_DEVICE = 1 << 40


def inode_of(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def script_of(function: Callable[[Path], None]) -> str:
    """A program that calls a function, which must import what it uses by itself: the recorder has to be there
    when the process starts, so the function cannot run in this one."""
    source = textwrap.dedent(inspect.getsource(function))
    call = f"{function.__name__}(Path(sys.argv[1]))"
    return f"import sys\nfrom pathlib import Path\n{source}\n{call}\n"


def run(
    program: Sequence[str] | Callable[[Path], None],
    root: Path,
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    expect_success: bool = True,
    timeout_s: float = 300,
) -> Recording:
    """Runs a program and records it.

    Parameters
    ----------
    program
        A command, or a function of the root (see `script_of`). Imports find tests/ and what this process
        finds.
    root
        An existing directory; what is in it is durable at the start.
    log
        Where the log goes; beside the root by default.
    expect_success
        Raise ProgramError when the program fails; without it, its log is taken as far as it goes.
    """
    root = root.resolve()
    log = log or root.with_name(root.name + ".log")
    log.unlink(missing_ok=True)
    state = root.stat()
    initial = read_initial(root)
    command = list(program) if not callable(program) else [sys.executable, "-c", script_of(program), str(root)]
    search = [str(Path(__file__).parents[2]), *(entry for entry in sys.path if entry)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONDONTWRITEBYTECODE": "1",
        **(environment or {}),
        "LD_PRELOAD": " ".join(filter(None, [os.environ.get("LD_PRELOAD", ""), str(build_recorder())])),
        "ONIONSKIN_CRASH_ROOT": str(root),
        "ONIONSKIN_CRASH_LOG": str(log),
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s, check=False)
    if expect_success and done.returncode != 0:
        raise ProgramError(f"{command[0]} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    entries, truncated = parse_log(log.read_bytes()) if log.exists() else ([], False)
    return Recording(root, entries, truncated, initial, (state.st_dev, state.st_ino), done.stdout + done.stderr)


@dataclass(frozen=True)
class Violation:
    """A state that a checker found wrong."""

    index: int
    kind: str
    description: str
    last_marker: str
    problems: list[str]

    def __str__(self) -> str:
        return (
            f"after record {self.index} ({self.kind}: {self.description}; last marker {self.last_marker!r}): "
            f"{'; '.join(self.problems)}"
        )


@dataclass
class Report:
    """The outcome of checking the states of one recording."""

    tried: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    @property
    def states_per_second(self) -> float:
        return self.tried / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.by_kind.items()))
        lines = [f"{self.tried} states ({kinds}), {len(self.violations)} violations"]
        return "\n".join(lines + [f"  {violation}" for violation in self.violations[:20]])


def choose_states(
    recording: Recording,
    kinds: Sequence[str] = KINDS,
    limit: int | None = None,
    seed: int = 0,
    begin: int = 0,
) -> Iterator[State]:
    """The states of a recording after its first `begin` records, or a seeded choice of at most `limit` of
    them, in the order of the log."""
    replay = recording.replay()
    plans = [plan for plan in replay.plans(kinds) if plan.index >= begin]
    if limit is not None and len(plans) > limit:
        plans = random.Random(seed).sample(plans, limit)
    return replay.states(plans, seed)


class StateDirectory:
    """Where states are made, one after the other.

    By default it is the root that was recorded, and files that were there before keep their inode and get the
    mtime that they had: paths and identities that the program wrote down hold in each state. It is put back
    as it was found at the end.
    """

    def __init__(self, recording: Recording, directory: Path | None) -> None:
        self._recording = recording
        self._own = directory
        self._aside = recording.root.with_name(recording.root.name + ".recorded")
        self._parked = recording.root.with_name(recording.root.name + ".parked")

    def __enter__(self) -> StateDirectory:
        if self._own is None:
            self._parked.mkdir()
            for file in self._recording.initial:
                if not file.is_directory:
                    self._park(file)
            self._recording.root.rename(self._aside)
        return self

    def _park(self, file: InitialFile) -> None:
        """The program may have renamed or unlinked it; where its inode is gone, a new one has to do."""
        parked = self._parked / parked_name(file.path)
        for path in self._recording.root.rglob("*"):
            if path.is_file() and path.stat().st_ino == file.inode[1]:
                parked.hardlink_to(path)
                return
        parked.write_bytes(file.contents)

    def make(self, state: State) -> Path:
        if self._own is None:
            state.materialise(self._recording.root, self._parked)
            return self._recording.root
        shutil.rmtree(self._own, ignore_errors=True)
        state.materialise(self._own)
        return self._own

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own or self._recording.root, ignore_errors=True)
        if self._own is None:
            self._aside.rename(self._recording.root)
            shutil.rmtree(self._parked)


def check_states(
    recording: Recording,
    checker: Checker,
    *,
    kinds: Sequence[str] = KINDS,
    limit: int | None = None,
    seed: int = 0,
    directory: Path | None = None,
    violations_max: int | None = None,
    begin: int = 0,
) -> Report:
    """Makes the states of a recording and lets a checker judge each.

    Parameters
    ----------
    checker
        Called with the directory of a state, which it may change, and the texts of the markers before the
        crash; returns what is wrong, nothing where all is well. What it raises counts as a violation.
    kinds, limit, seed
        Which states; `limit` draws from all of them.
    directory
        Where to make the states; None: in the recorded root itself (see `StateDirectory`).
    violations_max
        Stop after so many.
    begin
        Leave out the states at earlier points of the log.
    """
    report = Report()
    start = time.monotonic()
    with StateDirectory(recording, directory) as place:
        for state in choose_states(recording, kinds, limit, seed, begin):
            path = place.make(state)
            problems = judge(checker, path, state.markers)
            report.tried += 1
            report.by_kind[state.kind] += 1
            if problems:
                last = state.markers[-1].text if state.markers else ""
                report.violations.append(Violation(state.index, state.kind, state.description, last, problems))
                if violations_max is not None and len(report.violations) >= violations_max:
                    break
    report.seconds = time.monotonic() - start
    return report


def judge(checker: Checker, path: Path, markers: Sequence[Marker]) -> list[str]:
    try:
        return checker(path, [marker.text for marker in markers])
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
