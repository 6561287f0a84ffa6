"""How the process of a command ends: at once, without taking all modules apart, unless somebody waits for its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from onionskin import Store

PROGRAM = """
import os, sys
from onionskin import cli
leave = os._exit
def say_and_leave(status):
    os.write(2, b"at once")
    leave(status)
os._exit = say_and_leave
sys.argv = ["onionskin", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    "verb", ["list {}", "snapshot {}/web@a", "fork {}/web -n 2", "prune {}/web --keep-last 1", "expire {}"]
)
def test_a_verb_that_leaves_nothing_to_wait_for_ends_at_once(tmp_path: Path, verb: str) -> None:
    with Store(tmp_path) as store:
        store.create("web", size="1M").close()
    words = verb.format(tmp_path).split()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "at once")
