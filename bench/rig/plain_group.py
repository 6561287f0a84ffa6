"""Runs ``plain_group.c``: what the file system has to do for a group snapshot, and nothing else of onionskin."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rig.group_load import WRITES_PER_SECOND, Load, Write

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("plain_group.c")


class PlainGroup:
    """The program while it writes."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.load = Load()

    def take(self) -> None:
        """Have it take one snapshot; it makes the next one's files behind the return."""
        self._hear("done")
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._hear("taken")

    def end(self) -> None:
        output, _ = self._process.communicate()
        for line in output.splitlines():
            begun, _, took = line.partition(" ")
            if took:
                self.load.writes.append(Write(float(begun), float(took)))

    def _hear(self, word: str) -> None:
        assert self._process.stdout
        if (line := self._process.stdout.readline()).strip() != word:
            raise RuntimeError(f"the plain program said {line!r} instead of {word!r}")


def build(directory: Path) -> Path:
    """Compile the program."""
    program = directory / "plain_group"
    command = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", "-pthread", "-o", program]
    subprocess.run([*command, SOURCE, ROOT / "csrc/base/turns.c", "-lm"], check=True)
    return program


@contextmanager
def plain_group(program: Path, directory: Path, disks: int) -> Iterator[PlainGroup]:
    """Write to as many disks at the rate of `group_load`, until the block ends; then its load is known."""
    directory.mkdir()
    command = [program, directory, str(disks), str(WRITES_PER_SECOND)]
    plain = PlainGroup(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        yield plain
    finally:
        plain.end()
