"""A new file has its name when all of it is there, and replaces none."""

import os
import signal
from pathlib import Path

import pytest

from onionskin.operations.new_file import new_file


def test_a_file_has_its_name_at_the_end(tmp_path: Path) -> None:
    with new_file(tmp_path / "delta") as file:
        file.write(b"all of it")
        assert not (tmp_path / "delta").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["delta"]
    assert (tmp_path / "delta").read_bytes() == b"all of it"


def test_a_writer_that_is_killed_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        try:
            with new_file(tmp_path / "delta") as file:
                file.write(b"a part of it")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [one.suffix for one in tmp_path.iterdir()] == [".part"]


@pytest.mark.parametrize("letter", ["d", "ä"])
def test_a_file_may_have_the_longest_name(tmp_path: Path, letter: str) -> None:
    name = (letter * 255).encode()[:254].decode()
    with new_file(tmp_path / name) as file:
        file.write(b"all of it")
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "delta") as file:
        file.write(b"a part of it")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_or_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "delta"
    with pytest.raises(FileExistsError, match="delta"), new_file(target):
        target.write_bytes(b"of somebody else")
    with pytest.raises(FileExistsError, match="delta"), new_file(target):
        raise AssertionError("it was begun")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"of somebody else"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none/delta"), new_file(tmp_path / "none" / "delta"):
        raise AssertionError("it was begun")
