"""Each two verbs of machines, which two processes carry out on one machine at once.

What must hold behind them, in whatever order their steps fall: the machine is as some order of the two leaves it; what said
success was done in full, and what failed says why in one line; disk and memory agree; nothing stands still or runs that
nobody knows of; and when all has ended, no process, file, row or copy of RAM is left. `support/machine_model.py` says what
each verb does.
"""

import random
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
from support.guests import Console, build_tick_disk, configuration, until
from support.machine_model import OFF, PAUSED, RUNNING, VERBS
from support.machine_pairs import BEGINNINGS, Round, processes_of
from support.rounds import ALL

import onionskin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
FEW = [
    (RUNNING, ("snapshot live", "revert ready")),
    (RUNNING, ("merge ready", "revert ready")),
    (RUNNING, ("stop --force", "snapshot")),
    (RUNNING, ("fork", "revert first")),
    (PAUSED, ("resume", "snapshot pause")),
    (OFF, ("revert first", "start")),
    (OFF, ("delete", "start paused")),
    ("resumes", ("merge ready", "start")),
]
PAIRS = list(product(BEGINNINGS, combinations_with_replacement(VERBS, 2))) if ALL else FEW


def make_template(directory: Path, qemu: list[str]) -> Path:
    """A store with a machine that is off, and was taken as `first` and `ready` while it ran."""
    one = configuration(qemu)
    with onionskin.Store(directory / "template") as store:
        store.create("web", base=build_tick_disk(directory)).close()
        store.create("data", size="1M").close()
        with store.open("web") as disk:
            disk.snapshot("base")
        machine = store.create_machine(
            "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
        )
        machine.start()
        for name in ("first", "ready"):
            with Console(machine._directory / "console") as screen:
                screen.wait_ticks()
            machine.snapshot(name)
        machine.stop(force=True)
    until(lambda: not processes_of(directory))  # its supervisor closes the store behind that
    return directory / "template"


@pytest.fixture(scope="module")
def template(qemu: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("pairs"), qemu)


def test_two_verbs_at_once_leave_what_some_order_of_them_does(template: Path, tmp_path: Path) -> None:
    draw = random.Random(13)
    for number, (begins, verbs) in enumerate(PAIRS):
        Round(template, tmp_path / f"round-{number}", begins, verbs, draw).play()
