"""A program that is started before it is known what it is to run: Python stands in for QEMU."""

import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onionskin.errors import StateError
from onionskin.machine import loaded_qemu
from onionskin.machine.loaded_qemu import LoadedQemu
from onionskin.machine.record import open_log

TELLS = """
import json, mmap, os, sys

with open("stand-in", "r+b") as file, mmap.mmap(file.fileno(), 4096) as ram:
    ram[8:13] = b"guest"
    names = ("LD_PRELOAD", "ONIONSKIN_WAIT", "ONIONSKIN_ROOM", "ONIONSKIN_RAM")
    said = {"ram": ram[:13].hex(), "words": sys.argv[1:], "environment": [one for one in names if one in os.environ]}
    said["shown"] = open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0))
    said["open"] = sorted(int(one) for one in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{one}"))
    print(json.dumps(said), flush=True)
"""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    descriptor = open_log(tmp_path / "log", os.O_TRUNC)
    yield descriptor
    os.close(descriptor)


def run(loaded: LoadedQemu, tmp_path: Path, log: int, *words: str) -> int | None:
    """Have it run words of Python, and return its status, or None where it does not."""
    child = loaded.run([loaded._program, *words], tmp_path, log, tmp_path / "ram", tmp_path / "stand-in", "preload")
    return None if child is None else child.wait(300)


def test_it_runs_a_command_line_as_if_it_had_been_started_with_it(tmp_path: Path, log: int) -> None:
    (tmp_path / "ram").write_bytes(b"saved".ljust(4096, b"\0"))
    (tmp_path / "stand-in").write_bytes(bytes(4096))
    words = ["-c", TELLS, "", "a b", "x" * 2000]
    assert run(LoadedQemu(sys.executable), tmp_path, log, *words) == 0
    said = json.loads((tmp_path / "log").read_text())
    assert bytes.fromhex(said["ram"]) == b"saved\0\0\0guest"
    assert (tmp_path / "ram").read_bytes()[:13] == b"saved".ljust(13, b"\0")
    assert (said["words"], said["environment"]) == (words[2:], [])
    assert said["shown"] == [sys.executable, *words]
    assert (tmp_path / "preload").is_socket()


ROOM = """
import ctypes, resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
system = ctypes.CDLL(None)
system.malloc.restype = ctypes.c_void_p
piece = system.malloc(ctypes.c_size_t(16 << 20))
ctypes.memset(piece, 1, 16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps no room")
@pytest.mark.parametrize("has_room", [True, False])
def test_one_that_waited_has_the_memory_that_it_needs_first(tmp_path: Path, log: int, has_room: bool) -> None:
    (tmp_path / "ram").write_bytes(bytes(4096))
    loaded = LoadedQemu(sys.executable, (24 << 20) if has_room else 0)
    assert run(loaded, tmp_path, log, "-c", ROOM) == 0
    faults, pages = int((tmp_path / "log").read_text()), (16 << 20) // 4096
    assert (faults < pages // 2) == has_room


@pytest.mark.parametrize("room", [31 << 20, 1 << 40, -1])
def test_one_that_cannot_have_so_much_memory_runs_without(tmp_path: Path, log: int, room: int) -> None:
    assert run(LoadedQemu(sys.executable, room), tmp_path, log, "-c", "print('it ran')") == 0
    assert (tmp_path / "log").read_text() == "it ran\n"


def test_one_that_waits_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    loaded = LoadedQemu(sys.executable)
    loaded._socket.close()
    assert loaded._child.wait(300) == 1


def test_one_that_can_be_found_by_its_log_runs_nothing_before_it_is_told_to_go_on(tmp_path: Path, log: int) -> None:
    loaded = LoadedQemu(sys.executable)
    words = [tmp_path, tmp_path / "ram", tmp_path / "ram", "preload", sys.executable, "-c", "print('it ran')"]
    assert loaded._hand_over([os.fsencode(one) for one in words], log)
    assert os.readlink(f"/proc/{loaded.pid}/fd/2") == str(tmp_path / "log")  # noqa: PTH115 - as others look for it
    loaded._socket.close()
    assert loaded._child.wait(300) == 1
    assert (tmp_path / "log").read_bytes() == b""
    assert not (tmp_path / "preload").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_was_killed_or_stopped_is_gone_and_runs_nothing(
    tmp_path: Path, log: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_qemu, "ANSWER_SECONDS", 0.05)
    loaded = LoadedQemu(sys.executable)
    os.kill(loaded.pid, number)
    assert run(loaded, tmp_path, log, "-c", "print('it ran')") is None
    assert loaded._child.returncode == -signal.SIGKILL
    assert (tmp_path / "log").read_bytes() == b""


def test_another_version_of_the_program_is_started_anew(tmp_path: Path, log: int) -> None:
    program = shutil.copy(os.path.realpath(sys.executable), tmp_path / "program")
    loaded = LoadedQemu(str(program))
    os.utime(program, (0, 0))
    assert run(loaded, tmp_path, log, "-c", "") is None


def test_words_that_are_too_many_for_a_message_are_for_one_that_is_started_with_them(tmp_path: Path, log: int) -> None:
    assert run(LoadedQemu(sys.executable), tmp_path, log, "-c", "", *["x" * 100_000] * 20) is None


def test_a_program_that_the_library_is_not_in_has_ended(
    tmp_path: Path, log: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_qemu, "library", lambda: tmp_path / "none")
    assert run(LoadedQemu(shutil.which("true") or ""), tmp_path, log) is None


def test_a_script_is_not_started_ahead_since_it_starts_another_program(tmp_path: Path) -> None:
    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh\nexec qemu-system-x86_64 $@\n")
    script.chmod(0o700)
    with pytest.raises(StateError, match="no program of the processor"):
        LoadedQemu(str(script))
