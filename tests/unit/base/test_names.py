"""Many names of files by one call, and many looks at files."""

import errno
import os
import socket
from pathlib import Path

import pytest

from onionskin.base._names import leads_to, link_all, sizes_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"what it holds")
    return tmp_path / "file"


def _link(file: Path, *names: str, flags: int = os.O_RDONLY, replaces: bool = False) -> list[int]:
    descriptor = os.open(file, flags)
    try:
        return link_all(descriptor, [str(file.parent / name) for name in names], replaces=replaces)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_each_name_leads_to_the_file(file: Path, flags: int) -> None:
    assert _link(file, "one", "two", "three", flags=flags) == [0, 0, 0]
    assert all(file.samefile(file.with_name(name)) for name in ("one", "two", "three"))


def test_what_is_there_stays_and_the_others_get_their_names(file: Path) -> None:
    file.with_name("one").write_text("another")
    assert _link(file, "one", "nowhere/two", "three") == [errno.EEXIST, errno.ENOENT, 0]
    assert file.with_name("one").read_text() == "another"
    assert file.samefile(file.with_name("three"))


def test_what_is_there_is_replaced_if_that_is_asked_for_but_no_directory(file: Path) -> None:
    file.with_name("one").symlink_to("file")
    file.with_name("two").mkdir()
    assert _link(file, "one", "two", "three", replaces=True) == [0, errno.EEXIST, 0]
    assert not file.with_name("one").is_symlink() and file.samefile(file.with_name("one"))
    assert file.with_name("two").is_dir()


def test_a_file_that_has_no_name_any_more_gets_none(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    file.unlink()
    assert link_all(descriptor, [str(file), str(file.with_name("one"))]) == [errno.ENOENT] * 2
    os.close(descriptor)
    assert link_all(descriptor, [str(file)]) == [errno.EBADF]


def test_a_listening_socket_gets_names_at_which_it_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("first")
        listening.listen()
        assert _link(tmp_path / "first", "one", "two", flags=os.O_PATH) == [0, 0]
        for name in ("one", "two"):
            with socket.socket(socket.AF_UNIX) as calling:
                calling.connect(name)


def test_a_path_leads_to_an_open_file_by_each_of_its_names_and_no_other_does(file: Path) -> None:
    file.with_name("one").hardlink_to(file)
    file.with_name("two").symlink_to(file)
    file.with_name("three").write_bytes(file.read_bytes())
    with file.open() as opened:
        names = ("file", "one", "two", "three", "none")
        assert [leads_to(opened.fileno(), str(file.with_name(name))) for name in names] == [True, True, *[False] * 3]
    with pytest.raises(ValueError, match="zero byte"):
        leads_to(0, "a\0b")


def test_the_sizes_of_files_are_told_and_one_that_is_not_there_has_none(file: Path) -> None:
    assert sizes_of([str(file), str(file.with_name("none")), str(file)]) == [13, 0, 13]
    assert sizes_of([]) == []


def test_a_file_that_cannot_be_looked_at_is_none_without_a_size(file: Path) -> None:
    with pytest.raises(NotADirectoryError, match="file/below"):
        sizes_of([str(file), str(file / "below")])
    with pytest.raises(ValueError, match="zero byte"):
        sizes_of(["a\0b"])
