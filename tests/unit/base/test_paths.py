"""The paths of a store, beside those of pathlib."""

import os
import pickle
from pathlib import Path

import pytest

from onionskin.base.paths import FilePath

TEXTS = [
    "a",
    "a/b",
    "/",
    "/a",
    "/a/b.c/",
    "a//b",
    "./a",
    "a/.",
    "a/./b",
    "..",
    "../a",
    "a/..",
    ".",
    "",
    "//a",
    "///a/b",
    ".a",
    "a.b/",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_written_as_pathlib_writes_it(text: str) -> None:
    ours, theirs = FilePath(text), Path(text)
    assert str(ours) == str(theirs)
    assert os.fspath(ours) == os.fspath(theirs)
    assert (ours.name, ours.parent) == (theirs.name, str(theirs.parent))
    assert list(ours.parents) == list(map(str, theirs.parents))
    assert ours.suffix == theirs.suffix
    assert ours / "x" == str(theirs / "x")
    assert ours / "/x" == "/x"
    assert ours.absolute() == str(theirs.absolute())
    assert ours.resolve() == str(theirs.resolve())


@pytest.mark.parametrize(("path", "other"), [("/a/b", "/a"), ("/ab", "/a"), ("/a", "/a"), ("/a", "/"), ("a", "b")])
def test_a_path_leads_below_another_where_it_does_for_pathlib(path: str, other: str) -> None:
    assert FilePath(path).is_relative_to(FilePath(other)) == Path(path).is_relative_to(other)


def test_a_name_and_a_suffix_are_exchanged_as_in_pathlib() -> None:
    for text in ("/a/b.lock", "b.lock", "b"):
        assert FilePath(text).with_name("c") == str(Path(text).with_name("c"))
        assert FilePath(text).with_suffix(".d") == str(Path(text).with_suffix(".d"))


def test_files_are_looked_at_made_and_removed_as_in_pathlib(tmp_path: Path) -> None:
    ours = FilePath(tmp_path) / "made"
    assert not ours.exists() and not ours.is_dir() and not ours.is_file()
    ours.mkdir(0o700)
    ours.mkdir(exist_ok=True)
    with pytest.raises(FileExistsError):
        ours.mkdir()
    assert ours.is_dir() and not ours.is_file()
    (ours / "file").write_bytes(b"kept")  # by pathlib
    assert (ours / "file").is_file() and (ours / "file").stat().st_size == 4
    assert not (ours / "file" / "below").exists() and not FilePath("a\0").exists()
    (ours / "link").symlink_to("loop")
    (ours / "loop").symlink_to("link")
    assert not (ours / "loop").exists() and (ours / "loop").lstat()
    (ours / "file").unlink()
    (ours / "file").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (ours / "file").unlink()


def test_an_error_other_than_that_nothing_is_there_is_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        (FilePath(tmp_path) / ("x" * 300)).exists()


def test_a_path_of_bytes_is_refused_and_one_of_a_path_is_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bytes"):
        FilePath(b"a")  # type: ignore[arg-type]
    assert FilePath(tmp_path) == str(tmp_path) and FilePath(FilePath("a")) == "a"
    assert type(pickle.loads(pickle.dumps(FilePath("a")))) is FilePath
