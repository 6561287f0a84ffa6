"""One page's code blocks as one session of bash, in order, in one directory: as a reader would type them.

A Python block is a program of its own that the session starts. What a ``console`` block shows below a command is what
the command has to print, where ``...`` stands for anything.
"""

import contextlib
import doctest
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.blocks import Block

import onionskin

MARK = "\x1e"  # stands in the output before each step
SECONDS_MAX = 1200  # only a session that hangs takes so long, also on a busy host
# All are errors but the one of Python 3.12 and newer about a fork beside threads, which other libraries start.
WARNINGS = "-W error -W 'ignore:This process:DeprecationWarning'"
COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of a session, and what it must print; None is anything."""

    block: Block
    commands: str
    expected: str | None


def steps_of(block: Block, programs: Path) -> list[Step]:
    """Cut a block into steps; a Python block is written to a file in `programs`."""
    if block.language == "python":
        program = programs / f"{block.page.stem}-{block.line}.py"
        program.write_text(block.text)
        return [Step(block, f"python {WARNINGS} {shlex.quote(str(program))}\n", None)]
    if block.language == "console":
        return [Step(block, command, expected) for command, expected in _typed(block)]
    return [Step(block, block.text, None)]


def _typed(block: Block) -> Iterator[tuple[str, str]]:
    """Give each command behind a ``$``, with its continuations behind ``>``, and the output that is shown below it."""
    command, shown = "", ""
    for line in block.text.splitlines(keepends=True):
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], ""
        elif line.startswith("> ") and not shown:
            command += line[2:]
        else:
            shown += line
    assert command, f"{block}: a console block without a command"
    yield command, shown


def run_session(steps: list[Step], directory: Path) -> None:
    """Run the steps, and fail with the page and line of the one that fails or prints something else."""
    script = "set -euo pipefail\n" + "".join(f"printf '{MARK}'\n{step.commands}" for step in steps)
    status, output = _bash(script, directory)
    printed = output.split(MARK)[1:]
    if status:
        block = steps[len(printed) - 1].block
        raise AssertionError(f"{block}: exit status {status} after\n{steps[len(printed) - 1].commands}{printed[-1]}")
    for step, got in zip(steps, printed, strict=True):
        if step.expected is not None and not doctest.OutputChecker().check_output(step.expected, got, COMPARE):
            raise AssertionError(f"{step.block}: {step.commands}shown:\n{step.expected}\nprinted:\n{got}")


def _bash(script: str, directory: Path) -> tuple[int, str]:
    """Run a script in a session of its own, and end what it leaves running."""
    output = directory.with_suffix(".output")
    with output.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=directory,
            env=_environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(SECONDS_MAX)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    return status, output.read_text(errors="replace")


def _environment(directory: Path) -> dict[str, str]:
    """Put onionskin on the PATH, as it is when it is installed, and the tools that need not be there for every user."""
    programs = directory.with_suffix(".bin")
    programs.mkdir(exist_ok=True)
    command = programs / "onionskin"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m onionskin "$@"\n')
    command.chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]
    package = Path(onionskin.__file__).parents[1]
    return os.environ | {"PATH": ":".join(path), "PYTHONPATH": str(package), "COLUMNS": "120", "TZ": "UTC"}
