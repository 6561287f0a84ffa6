"""A SIGBUS that is not the engine's: whoever waited for it before gets it, and where nobody did the process ends by it."""

import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import faulthandler, mmap, os, sys, onionskin
if sys.argv[2] == "handled":
    faulthandler.enable()
with onionskin.Store(sys.argv[1] + "/store") as store, store.create("web", size="1M") as volume:
    volume.write(0, b"x" * 4096)
    assert volume.read(0, 1) == b"x"
    with open(sys.argv[1] + "/file", "w+b") as file:
        file.truncate(8192)
        mapping = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        mapping[5000]
"""


def run(directory: Path, how: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, directory, how], check=False, capture_output=True, text=True, timeout=300
    )


def test_a_fault_in_a_mapping_of_somebody_else_ends_the_process_as_it_would(tmp_path: Path) -> None:
    done = run(tmp_path, "not handled")
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == ""


def test_a_handler_that_was_there_before_gets_the_faults_that_are_not_ours(tmp_path: Path) -> None:
    done = run(tmp_path, "handled")
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
