"""The harness of pairs: that its model judges rightly, that it holds where it says, and what it finds within minutes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pairs import model
from pairs.aftermath import Remains, events_of, plan_of, read_files
from pairs.faults_taken_out import FAULTS, TREE
from pairs.model import Event, Found, State, Volume
from pairs.runs import Run
from pairs.steps import Note
from pairs.units import ALIEN, disk_bytes, numbers_of, values_of
from pairs.verbs import BY_NAME
from pairs.world import World

TESTS = Path(__file__).parents[1]
DISK = (1, 1, 2, 2)
BEFORE = State(volumes={"v": Volume("v", DISK)}, handles={"h": "v"})


def pairs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pairs", *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )


def event(*operation: object, begun: int, ended: int, status: str = "done", result: object = None) -> Event:
    return Event(operation, status, result, begun, ended)


def explained(actors: list[list[Event]], head: tuple[int, ...], *, faulty: bool = False) -> model.Explanation:
    return model.explain(BEFORE, actors, Found({"v": head}, {}, {}), faulty=faulty, torn=set())


def test_two_writes_at_once_may_come_in_either_order() -> None:
    first, second = event("write", "h", 0, 7, 2, begun=0, ended=5), event("write", "h", 0, 8, 2, begun=1, ended=3)
    assert explained([[first], [second]], (7, 7, 2, 2)).found
    assert explained([[first], [second]], (8, 8, 2, 2)).found


def test_a_write_that_ended_before_another_began_does_not_win() -> None:
    first, second = event("write", "h", 0, 7, 2, begun=0, ended=1), event("write", "h", 0, 8, 2, begun=2, ended=3)
    assert explained([[first], [second]], (8, 8, 2, 2)).found
    lost = explained([[first], [second]], (7, 7, 2, 2))
    assert not lost.found
    assert "head of v reads wrong in 2 units" in lost.nearest


def test_a_write_that_is_nowhere_is_not_explained() -> None:
    assert not explained([[event("write", "h", 0, 7, 2, begun=0, ended=1)]], DISK).found


def test_only_a_fault_may_lose_what_was_not_flushed() -> None:
    written, flushed = event("write", "h", 0, 7, 2, begun=0, ended=1), event("flush", "h", begun=2, ended=3)
    assert explained([[written]], DISK, faulty=True).found
    assert not explained([[written, flushed]], DISK, faulty=True).found


def test_an_operation_that_was_killed_was_done_or_not() -> None:
    killed = event("write", "h", 0, 7, 2, begun=0, ended=1 << 30, status="maybe")
    assert explained([[killed]], DISK).found
    assert explained([[killed]], (7, 7, 2, 2)).found
    assert not explained([[killed]], (9, 7, 2, 2)).found


def test_an_operation_that_raised_and_was_done_is_told_apart() -> None:
    raised = event("write", "h", 0, 7, 2, begun=0, ended=1, status="raised", result="busy")
    assert explained([[raised]], DISK).late is None
    assert explained([[raised]], (7, 7, 2, 2)).late == "write raised and was done"


def test_a_name_that_is_there_may_not_be_missed() -> None:
    missed = event("rename", "v", "n", begun=0, ended=1, status="raised", result="not found")
    assert not explained([[missed]], DISK).found
    missed = replace(missed, operation=("rename", "x", "n"))
    assert explained([[missed]], DISK).found


def test_a_volume_that_was_made_and_taken_back_may_have_been_seen() -> None:
    create = ("create", "own", "n", 8, None, "made")
    failed = [
        event(*create, begun=0, ended=5, status="maybe"),
        event("take_back", create, begun=0, ended=5, status="maybe"),
    ]
    for seen, is_right in (({"n": 0, "v": 0}, True), ({"v": 0}, True), ({"o": 0, "v": 0}, False)):
        listed = event("volumes", begun=1, ended=2, result=seen)
        assert explained([failed, [listed]], DISK).found is is_right
    assert not explained([failed[:1], [event("volumes", begun=1, ended=2, result={"n": 0, "v": 0})]], DISK).found


def test_a_read_has_what_was_there_before_or_what_is_written_meanwhile() -> None:
    written = event("write", "h", 0, 7, 2, begun=1, ended=4)
    for unit, is_right in ((1, True), (7, True), (2, False)):
        result = [frozenset({unit}), frozenset({1, 7}), frozenset({2}), frozenset({2})]
        read = event("read", "h", 0, begun=0, ended=5, result=result)
        assert explained([[read], [written]], (7, 7, 2, 2)).found is is_right


def test_an_image_is_the_disk_at_one_instant() -> None:
    writes = [event("write", "h", 0, 7, 2, begun=1, ended=2), event("write", "h", 2, 8, 2, begun=3, ended=4)]
    exported = event("export", "h", "x.img", begun=0, ended=5)
    for image, is_right in (((7, 7, 2, 2), True), ((1, 1, 8, 8), False)):
        found = Found({"v": (7, 7, 8, 8)}, {}, {"x.img": image})
        assert model.explain(BEFORE, [[exported], writes], found, faulty=False, torn=set()).found is is_right


@pytest.mark.parametrize(("died_at", "is_right"), [({}, False), ({0: 2}, False), ({0: 1}, True)])
def test_only_who_died_before_leaves_a_head_to_another_handle(died_at: dict[int, int], is_right: bool) -> None:
    notes = [Note(0, "holds 1234"), Note(1, "holds 1234")]
    run = Run(SimpleNamespace(notes=notes), SimpleNamespace(state=BEFORE), [])
    run.died_at = died_at
    run._judge_holders()
    assert run.verdict.violations == ([] if is_right else ["two handles hold one head"])


def test_a_unit_says_where_and_when_it_was_written() -> None:
    data = disk_bytes((5, 0, 6), first=3)
    assert numbers_of(data, first=3) == (5, 0, 6)
    assert numbers_of(data, first=2) == (ALIEN, 0, ALIEN)
    assert values_of(data[:1024] + bytes(1024), first=3) == [frozenset({5, 0})]


def test_a_pair_is_held_at_the_step_that_is_asked_for() -> None:
    done = pairs("--one", "write", "snapshot", "--step", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    (held,) = [line for line in done.stdout.splitlines() if "held here" in line]
    assert held.split()[0] == "3"
    assert "B snapshot: done" in done.stdout


def test_a_verb_ends_beside_one_that_is_stopped_in_a_transaction() -> None:
    done = pairs(
        *("--one", "note", "snapshot", "--place", "processes", "--relation", "other", "--fault", "stopped"),
        *("--step", "5"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "locked by another process for over a minute" in done.stdout
    assert "A set_note: done" in done.stdout


@pytest.mark.parametrize("how", ["kill", "Ctrl-C, then live"])
def test_a_second_verb_meets_what_an_interrupted_merge_into_the_base_left(how: str) -> None:
    done = pairs(
        *("--aftermath", "--first", "merge into base", "--fault", how, "--step", "25", "--wipe", "release"),
        *("--second", "export", "--relation", "same"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "export: done" in done.stdout
    assert "C merge_base: done" in done.stdout


def test_a_base_that_an_interrupted_verb_made_is_laid_out_with_its_inode(tmp_path: Path) -> None:
    """The catalog goes by the inode, and what another interruption left, which is laid out in between, has no such file."""
    world = World(tmp_path, "release", {}, {}, {}, {}, BEFORE)
    for directory in ("layers", "segments", "volumes"):
        (world.store / directory).mkdir(parents=True)
    before = Remains("flatten", "kill", 1, "", {}, read_files(world)[1], BEFORE, [])
    copy = tmp_path / "A-copy.img"
    copy.write_bytes(b"the base")
    inode = copy.stat().st_ino
    after = Remains("relocate a copy", "kill", 25, "", {}, read_files(world)[1], BEFORE, [])
    before.lay_out(world)
    (tmp_path / "other").touch()  # it may get the number of the inode that is free now
    copy.write_bytes(b"of another run")
    after.lay_out(world)
    assert copy.stat().st_ino == inode and copy.read_bytes() == b"the base"


@pytest.mark.slow
def test_a_verb_may_be_killed_in_the_store_that_another_one_left() -> None:
    done = pairs(
        *("--aftermath", "--first", "delete", "--step", "4", "--then", "flatten", "--then-step", "30"),
        *("--second", "serve", "--wipe", "release"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "C serve: done" in done.stdout


@pytest.mark.parametrize(
    ("kind", "text", "is_right"),
    [
        ("busy", "StateError: volume 'v' has gone; try again", False),
        (
            "busy",
            "StateError: a merge of 'v' into its base was begun and has not ended; merge into the base again",
            True,
        ),
        ("busy", "ChainError: the base base.img has changed since the volume was opened", False),
        ("damage", "FormatError: catalog.db is damaged", False),
        ("unexpected", "KeyError: 'v'", False),
        ("exists", "SnapshotExistsError: volume 'v' already has a snapshot 'new'", True),
    ],
)
def test_a_refusal_behind_an_interruption_needs_a_reason(kind: str, text: str, is_right: bool) -> None:
    plan = plan_of(BY_NAME["snapshot"], 1, "v", opens=False)
    wrong: list[str] = []
    before = replace(
        BEFORE, handles={"B": "v"}, snaps={("v", "new"): model.Snap(DISK, None)} if kind == "exists" else {}
    )
    outcomes = [("done", None, ""), ("raised", kind, text)]
    events, _ = events_of(SimpleNamespace(), plan, outcomes, faulty=0, begun=2, wrong=wrong)
    events[0] = replace(events[0], operation=("write", "B", 0, 7, 2))
    snaps = {("v", "new"): DISK} if kind == "exists" else {}
    found = model.explain(before, [events], Found({"v": (7, 7, 2, 2)}, snaps, {}), faulty=False, torn=set())
    assert (found.found and not found.late and not wrong) is is_right


@pytest.mark.parametrize("starts_elsewhere", [True, False])
def test_a_stream_may_be_refused_only_where_the_disk_of_that_name_is_another_one(starts_elsewhere: bool) -> None:
    start = (8, 8, 8, 8) if starts_elsewhere else DISK
    plan, wrong = plan_of(BY_NAME["apply"], 1, "v", opens=False), list[str]()
    text = "ChainError: volume 'v' stands on snapshot 's2', where the stream to 's3' does not start; revert"
    world = SimpleNamespace(streams={"v": (b"", start, DISK)})
    events, _ = events_of(world, plan, [("raised", "busy", text)], faulty=0, begun=1, wrong=wrong)
    before = replace(BEFORE, handles={plan.place.handle: "v"})
    found = model.explain(before, [events], Found({"v": DISK}, {}, {}), faulty=False, torn=set())
    assert (found.found and not wrong) is starts_elsewhere


@pytest.mark.soak
def test_verbs_in_what_interrupted_verbs_left() -> None:
    done = pairs("--aftermath", "--seconds", "20")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_some_pairs_of_verbs_at_some_of_their_steps() -> None:
    """The seed is in what it prints; `.ci/run` takes more time for it."""
    done = pairs("--seconds", "20")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_crowds_of_actors_in_random_orders() -> None:
    done = pairs("--random", "--seconds", "20")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_fix_that_the_pairs_take_out_is_in_its_file_once() -> None:
    for fault in FAULTS:
        for edit in fault.edits:
            assert (TREE / edit.file).read_text().count(edit.old) == 1, f"{fault.name}: {edit.old}"


@pytest.mark.slow
def test_a_fix_that_is_taken_out_is_found() -> None:
    """One of those that `python -m pairs.faults_taken_out` takes out."""
    done = subprocess.run(
        [sys.executable, "-m", "pairs.faults_taken_out", "--only", "A4: an opening"],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
