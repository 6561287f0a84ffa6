"""Records docs/session.md: the tutorial as a terminal shows it, with all that is printed and nothing left out.

It types what docs/tutorial.md has behind a ``$``, and its Python program, into one shell in an empty directory, as a reader
would. What must hold: a second recording differs from the first in times alone, and those are masked where two
recordings are compared, so that a test can tell when the page is no longer what the program prints.

    python tools/record_session.py [file, by default docs/session.md]
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
DIRECTORY = "/home/me/tutorial"  # what the recording says instead of the directory in which it was made
HEAD = """\
# The tutorial, recorded

This is a terminal in which all commands of the [tutorial](tutorial.md) were typed, with all that they printed. Nothing
is left out. `tools/record_session.py` makes it, and a test makes it again and compares.

"""
TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?( ?(UTC|Z|[+-]\d\d:?\d\d))?")


def main() -> None:
    """Record, and write the page."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "session.md"
    with tempfile.TemporaryDirectory() as scratch:
        page.write_text(record(TUTORIAL.read_text(), Path(scratch)))


def record(tutorial: str, scratch: Path) -> str:
    """Run the blocks of the tutorial, and return the page that shows them."""
    work = scratch / "tutorial"
    work.mkdir()
    lines = [line for block in typed(tutorial) for line in block]
    script = "set -e\n" + "".join(f"printf '%s\\n' {shlex.quote(prompted(line))}\n{line}\n" for line in lines)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=work,
        env=_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the tutorial ended with status {done.returncode}:\n{done.stdout}")
    shown = done.stdout.replace(str(work.resolve()), DIRECTORY)
    return f"{HEAD}```console\n{shown.rstrip()}\n```\n"


def prompted(command: str) -> str:
    """Return a command as a shell shows it, with a prompt before each of its lines."""
    first, *others = command.splitlines()
    return "\n".join([f"$ {first}", *(f"> {line}".rstrip() for line in others)])


def typed(tutorial: str) -> list[list[str]]:
    """Return the commands of each block; a Python program is written to a file by the shell, and run."""
    found = []
    for language, text in re.findall(r"^```(console|python)\n(.*?)^```$", tutorial, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append([f"cat > program.py << 'END'\n{text}END", "python program.py"])
        else:
            found.append([line[2:] for line in text.splitlines() if line.startswith("$ ")])
    return found


def masked(page: str) -> str:
    """Replace what differs between two recordings: times. Sizes are those of the tutorial, and the same everywhere."""
    return TIME.sub("TIME", page)


def _environment(scratch: Path) -> dict[str, str]:
    """Put this interpreter and its onionskin first, and the tools of file systems last."""
    programs = scratch / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("onionskin", "-m onionskin ")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module}"$@"\n')
        program.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return os.environ | {"PATH": path, "COLUMNS": "120", "TZ": "UTC", "LC_ALL": "C.UTF-8"}


if __name__ == "__main__":
    main()
