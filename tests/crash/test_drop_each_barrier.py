"""The convention by which barriers are taken out of a source tree."""

from pathlib import Path

import pytest
from crash.drop_each_barrier import BarrierError, find_barriers, without_barrier


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("    int status = onion_sync_file(log->fd); /* BARRIER: map frame */", "    int status = 0;"),
        ("        if (fdatasync(file_of(a, (b)))) /* BARRIER: zeros */", "        if (0)"),
        ("    sync_directory(Path(a).absolute().parent)  # BARRIER: a name", "    None"),
        ('    run("PRAGMA synchronous=FULL")  # BARRIER: commits', '    run("PRAGMA synchronous=OFF")'),
    ],
)
def test_the_sync_of_a_marked_line_is_taken_out(line: str, left: str) -> None:
    assert without_barrier(line) == left


@pytest.mark.parametrize(
    "line",
    [
        "    status = 0; /* BARRIER: none */",
        "    sync_file(  # BARRIER: cut",
        "    fsync(a) || fsync(b); /* BARRIER: two */",
    ],
)
def test_a_line_that_breaks_the_convention_is_refused(line: str) -> None:
    with pytest.raises(BarrierError):
        without_barrier(line)


def make_tree(tree: Path, c_source: str) -> Path:
    (tree / "csrc").mkdir()
    (tree / "src").mkdir()
    (tree / "csrc" / "head.c").write_text(c_source)
    return tree


def test_a_sync_without_a_name_is_reported(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "a = fsync(1); /* BARRIER: one */\n * fsync(2) in a comment\nb = fsync(3);\n")
    barriers, unnamed = find_barriers(tree)
    assert [(barrier.name, barrier.line) for barrier in barriers] == [("one", 0)]
    assert unnamed == ["csrc/head.c:3: b = fsync(3);"]


def test_two_barriers_of_one_name_are_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "a = fsync(1); /* BARRIER: one */\nb = fsync(2); /* BARRIER: one */\n")
    with pytest.raises(BarrierError, match="one name"):
        find_barriers(tree)
