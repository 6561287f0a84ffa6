"""The convention by which barriers are taken out of a source tree, and some that are taken out for real."""

import shutil
from pathlib import Path

import pytest
from crash.harness.drop_each_barrier import (
    WIPES,
    Amount,
    BarrierError,
    Verdict,
    copy_tree,
    find_barriers,
    judge,
    taken_out,
    without_barrier,
)
from crash.harness.scenarios import SCENARIOS

import onionskin

TREE = Path(__file__).parents[2]
OWN_SCENARIOS = Amount(seeds=0, steps=0, states=0, recoveries=0, wipes=WIPES, own_only=True)


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
    (tree / "csrc" / "volume").mkdir(parents=True)
    (tree / "src").mkdir()
    (tree / "csrc" / "volume" / "flush.c").write_text(c_source)
    return tree


def test_a_sync_without_a_name_is_reported(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "a = fsync(1); /* BARRIER: one */\n * fsync(2) in a comment\nb = fsync(3);\n")
    barriers, unnamed = find_barriers(tree)
    assert [(barrier.name, barrier.line) for barrier in barriers] == [("one", 0)]
    assert unnamed == ["csrc/volume/flush.c:3: b = fsync(3);"]


def test_two_barriers_of_one_name_are_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, "a = fsync(1); /* BARRIER: one */\nb = fsync(2); /* BARRIER: one */\n")
    with pytest.raises(BarrierError, match="one name"):
        find_barriers(tree)


def test_each_sync_has_a_name_and_each_name_a_scenario() -> None:
    barriers, unnamed = find_barriers(TREE)
    assert unnamed == []
    assert {barrier.name for barrier in barriers} == {name for scenario in SCENARIOS for name in scenario.barriers}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the extensions that are in use."""
    copy = tmp_path_factory.mktemp("engine") / "tree"
    copy_tree(TREE, copy)
    installed = Path(onionskin.__file__).parent
    for module in installed.rglob("*.so"):
        shutil.copy(module, copy / "src" / "onionskin" / module.relative_to(installed))
    return copy


def judge_without(engine: Path, name: str) -> Verdict:
    (barrier,) = (barrier for barrier in find_barriers(engine)[0] if barrier.name == name)
    with taken_out(engine, barrier):
        return judge(engine / "src", OWN_SCENARIOS, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exported image", "written delta name", "streamed file"])
def test_a_barrier_taken_out_of_the_python_code_is_noticed(engine: Path, name: str) -> None:
    verdict = judge_without(engine, name)
    print(f"{name}: noticed by {verdict.trial} in {verdict.tried} states")
    assert verdict.violation is not None


@pytest.mark.slow
def test_a_barrier_taken_out_of_the_c_code_is_noticed(engine: Path) -> None:
    verdict = judge_without(engine, "map frame")
    print(f"map frame: noticed by {verdict.trial} in {verdict.tried} states")
    assert verdict.violation is not None
