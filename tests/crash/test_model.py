"""The plan and the model of the crash workload, without an engine."""

import itertools

import pytest
from crash.harness.model import BLOCK_BYTES, SECTOR_BYTES, Disk, canary, plan


def test_a_plan_is_the_same_for_the_same_seed_and_policy() -> None:
    assert plan(3, "zero") == plan(3, "zero")
    assert plan(3, "zero") != plan(3, "release")


def test_each_step_begins_where_the_one_before_ended() -> None:
    steps = plan(1, "zero", 60).steps
    assert all(step.before == last.after for last, step in itertools.pairwise(steps))
    assert [step.number for step in steps] == list(range(len(steps)))


def test_the_plans_of_some_seeds_have_every_operation() -> None:
    found = {step.operation for seed in range(16) for step in plan(seed, "release", 60).steps}
    cloning = {"clone", "open_clone", "close_clone", "delete_clone"}
    forking = {"fork", "expire", "delete_several", "snapshot_group"}
    forking |= {"open_temporary", "write_temporary", "close_temporary"}
    changing = {"create", "write", "zero", "trim", "flush", "resize", "reopen"}
    assert found == cloning | forking | changing | {
        "snapshot",
        "revert",
        "discard",
        "merge",
        "merge_into_base",
        "flatten",
        "export",
    }


def test_an_unflushed_sector_may_be_old_or_new_but_nothing_else() -> None:
    old, new = canary(1) * 512, canary(2) * 32
    disk = Disk(old).changed(SECTOR_BYTES, new)
    assert disk.difference(old) is None
    assert disk.difference(disk.content) is None
    assert disk.difference(bytes(BLOCK_BYTES * 2)) is not None
    assert disk.difference(new + old[SECTOR_BYTES:]) is not None


@pytest.mark.parametrize("lost", [0, SECTOR_BYTES])
def test_a_flushed_sector_may_not_be_lost(lost: int) -> None:
    disk = Disk(bytes(1024)).changed(0, canary(1) * 64).flushed()
    assert disk.difference(disk.content[:lost] + bytes(512) + disk.content[lost + 512 :]) is not None
