"""A store that was made for a group can be used by its members, and by nobody else."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin

GROUP = 65500
MEMBER = """
import os, pkgutil, sys
import numpy
import onionskin
for module in pkgutil.walk_packages(onionskin.__path__, "onionskin."):
    if not module.name.startswith(("onionskin.pytest_plugin", "onionskin.__main__", "onionskin.machine._preload")):
        __import__(module.name)
os.umask(0o077)
os.setgroups([])
os.setresgid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
os.setresuid(65501, 65501, 65501)
with onionskin.Store(sys.argv[1], trust=True) as store, store.open("web") as web:
    assert web.read(0, 3) == b"old"
    web.write(0, b"new")
    web.snapshot("by a member")
    web.merge("a")
    web.write(4096, b"x")
    store.create("another", size="1M").close()
"""


@pytest.fixture
def passable() -> Iterator[Path]:
    """A directory that others reach: not pytest's, which each run of it closes to others anew."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.fixture
def root(passable: Path) -> Iterator[Path]:
    """A store of that group, whose volume is open."""
    before = os.umask(0o077)
    try:
        with onionskin.Store(passable / "store", group=GROUP) as store, store.create("web", size="1M") as web:
            web.write(0, b"old")
            web.snapshot("a")
            web.write(8192, b"y")
            yield passable / "store"
    finally:
        os.umask(before)


def work_as(root: Path, group: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MEMBER, root, str(group)], capture_output=True, text=True)


def everything_in(root: Path) -> list[Path]:
    return [root, *root.rglob("*")]


def test_all_files_of_a_store_of_a_group_are_for_its_members_whatever_the_umask(root: Path) -> None:
    paths = everything_in(root)
    assert any(path.suffix == ".dirty" for path in paths)
    for path in paths:
        found = path.lstat()
        assert found.st_gid == GROUP, path
        assert stat.S_IMODE(found.st_mode) == (0o2770 if path.is_dir() else 0o660), path


def test_members_and_the_owner_use_a_store_in_turns(passable: Path) -> None:
    with onionskin.Store(passable / "store", group=GROUP) as store, store.create("web", size="1M") as web:
        web.write(0, b"old")
        web.snapshot("a")
    ended = work_as(passable / "store", GROUP)
    assert ended.returncode == 0, ended.stderr
    with onionskin.Store(passable / "store") as store, store.open("web") as web:
        assert web.read(0, 3) == b"new"
        web.merge("by a member")
        web.write(0, b"own")
        assert store.check() == []
    for path in everything_in(passable / "store"):
        assert path.lstat().st_mode & 0o077 == 0o070 - (0 if path.is_dir() else 0o010), path


def test_who_is_no_member_of_the_group_gets_nothing(root: Path) -> None:
    ended = work_as(root, GROUP + 7)
    assert "Permission denied" in ended.stderr


def test_a_store_that_is_there_is_not_given_to_a_group_in_passing(tmp_path: Path, root: Path) -> None:
    onionskin.Store(tmp_path / "own").close()
    with pytest.raises(onionskin.StateError, match="was not made for group"):
        onionskin.Store(tmp_path / "own", group=GROUP)
    onionskin.Store(root, group=GROUP).close()


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no group 'nobody of this name'"):
        onionskin.Store(tmp_path / "store", group="nobody of this name")
    assert not (tmp_path / "store").exists()


def test_a_store_of_a_group_that_others_may_read_is_reported(root: Path) -> None:
    (root / "segments").chmod(0o2775)
    with onionskin.Store(root) as store:
        assert [problem.what for problem in store.check()] == ["its mode is 2775, so other users may get at it"]


def test_a_directory_that_is_there_keeps_its_mode_and_its_group(passable: Path) -> None:
    (passable / "mine").mkdir(mode=0o755)
    before = (passable / "mine").stat()
    with pytest.raises(onionskin.StateError, match="was not made for group"):
        onionskin.Store(passable / "mine", group=GROUP)
    after = (passable / "mine").stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
    assert list((passable / "mine").iterdir()) == []


def test_a_truth_is_no_number_of_a_group(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a group is a name or a number, not True"):
        onionskin.Store(tmp_path / "store", group=True)
