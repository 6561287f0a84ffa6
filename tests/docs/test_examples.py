"""The examples do what they say, as they are run by hand."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MIB = 1 << 20


@pytest.mark.slow
def test_an_array_larger_than_memory_is_worked_on_in_less_memory(tmp_path: Path) -> None:
    def limit() -> None:
        # All anonymous memory, also what is never touched: an index takes 256 MiB of addresses.
        resource.setrlimit(resource.RLIMIT_DATA, (2048 * MIB, 2048 * MIB))

    command = [sys.executable, EXAMPLES / "array_larger_than_memory.py", tmp_path / "store", "--size", "16G"]
    done = subprocess.run([*command, "--every", "512"], check=True, capture_output=True, text=True, preexec_fn=limit)
    array, fork, memory = done.stdout.splitlines()
    assert array == "array: 16 GiB, on disk 32 MiB"
    assert fork == f"fork: 240 MiB changed, by at most {(8192 - 512) * (1 - 1 / 16384):.6g}"
    assert memory.startswith("memory: ")
