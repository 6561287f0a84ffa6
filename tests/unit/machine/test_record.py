"""The files in a machine's directory, with anything in them that is not what was written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onionskin.errors import FormatError, StateError
from onionskin.machine.record import (
    RECORD,
    ProcessId,
    Record,
    make_directory,
    open_log,
    read_json,
    remove_directory,
)

ONE = Record(None, ProcessId.of(os.getpid()), None, "{}", "{}", "g", "s", "/ram", True, None)


def write(directory: Path, text: str) -> None:
    (directory / RECORD).write_text(text)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Record.read(tmp_path) is None
    ONE.write(tmp_path)
    assert Record.read(tmp_path) == ONE


def test_a_record_that_came_with_a_copy_of_the_store_means_no_process(tmp_path: Path) -> None:
    for name in ("store", "copy"):
        (tmp_path / name).mkdir()
    ONE.write(tmp_path / "store")
    (tmp_path / "copy" / RECORD).write_bytes((tmp_path / "store" / RECORD).read_bytes())
    assert Record.read(tmp_path / "copy") is None
    (tmp_path / "store").rename(tmp_path / "moved")
    assert Record.read(tmp_path / "moved") == ONE


def test_nobody_waits_for_a_fifo_in_the_place_of_a_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(FormatError, match="cannot be read"):
        Record.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "[" * 200_000, '{"supervisor": 5}', "{" + " " * (1 << 20) + "}"]
)
def test_a_record_that_is_none_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(FormatError, match=r"cannot be read; .* remove it"):
        Record.read(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"pid": "1"}, {"pid": -1}, {"pid": 10**30}, {"ticks": None}, {"boot": 3}, {"pid": True}]
)
def test_a_record_of_what_is_no_process_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    ONE.write(tmp_path)
    value = json.loads((tmp_path / RECORD).read_text())
    value["hypervisor"] |= wrong
    write(tmp_path, json.dumps(value))
    with pytest.raises(FormatError):
        Record.read(tmp_path)


def test_a_directory_in_the_place_of_a_record_is_named(tmp_path: Path) -> None:
    (tmp_path / RECORD).mkdir()
    with pytest.raises(FormatError, match=RECORD):
        Record.read(tmp_path)


def test_a_file_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "ended").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="too large"):
        read_json(tmp_path / "ended")


def test_a_link_in_the_place_of_a_machines_directory_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    directory = make_directory(tmp_path, b"m")
    directory.rmdir()
    directory.symlink_to(elsewhere)
    with pytest.raises(StateError, match="is no directory; remove"):
        make_directory(tmp_path, b"m")
    remove_directory(directory)
    assert not directory.is_symlink()
    assert (elsewhere / "precious").exists()


MAIN_THREAD_ENDS = """
import ctypes, platform, threading, time
from pathlib import Path

def stay():
    while Path("/proc/self/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    print(flush=True)
    time.sleep(1000)

threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(platform.machine(), 93), 0)  # exit, of this thread alone
"""


@pytest.mark.parametrize("what", ["a FIFO", "a FIFO with a reader", "a link", "a directory"])
def test_nothing_is_waited_for_or_written_to_that_is_no_log_in_its_place(tmp_path: Path, what: str) -> None:
    log, other = tmp_path / "supervisor.log", tmp_path / "other"
    other.write_text("precious")
    {"a link": lambda: log.symlink_to(other), "a directory": log.mkdir}.get(what, lambda: os.mkfifo(log))()
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK) if what.endswith("reader") else None
    with pytest.raises(FileExistsError, match=r"supervisor\.log"):
        open_log(log, os.O_TRUNC)
    if reader is not None:
        os.close(reader)
    assert other.read_text() == "precious"


def test_the_end_of_a_process_is_that_of_all_its_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", MAIN_THREAD_ENDS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        one = ProcessId.of(process.pid)
        assert not one.is_alive
        one.end(0)
        has_ended = process.poll() is not None
        process.kill()
    assert has_ended
