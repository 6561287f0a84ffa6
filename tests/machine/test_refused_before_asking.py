"""What cannot be done to a machine that runs is said by --dry-run, and before the question."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from support.guests import Console, configuration

import onionskin
from onionskin.cli.app import onionskin as command_line

pytestmark = pytest.mark.slow  # it starts several processes


def test_what_cannot_be_done_to_a_machine_that_runs_is_refused_before_anything_is_asked(
    store: onionskin.Store, vms: Path, qemu: list[str]
) -> None:
    one = configuration(qemu)
    lab = store.create_machine("lab", disks=["web"], memory="16M", program=one.program, qemu_args=one.qemu_args)
    lab.snapshot("off")
    lab.start()
    with Console(lab._directory / "console") as console:
        console.wait_ticks()
    lab.snapshot("ready")
    (fork,) = lab.fork("ready")
    refusals = {
        "revert {vms}/lab@off": "has no RAM: the machine was off when it was taken",
        "discard {vms}/lab@ready": "runs on what would be discarded",
        "revert {vms}/{fork} --beginning": "runs; stop it first",
        "delete {vms}/{fork}": "runs in process",
    }
    for verb, said in refusals.items():
        for more in ([], ["--dry-run"]):
            words = ["machine", *verb.format(vms=vms, fork=fork.name).split(), *more]
            refused = CliRunner().invoke(command_line, words)
            assert refused.exit_code == 5 and said in refused.stderr and "--yes" not in refused.stderr, words
    told = CliRunner().invoke(command_line, ["machine", "revert", f"{vms}/lab@ready", "--dry-run"])
    assert told.exit_code == 0, told.stderr
