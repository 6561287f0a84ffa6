"""Ctrl-C at any moment, three times in a row: the disk reads as before or as after, and the volume goes on."""

import subprocess
import sys
from pathlib import Path

WORK = Path(__file__).with_name("interrupted_work.py")


def test_a_volume_under_a_rain_of_interrupts_loses_nothing_and_never_hangs(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, WORK, tmp_path], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "nothing lost\n"), ended.stderr
