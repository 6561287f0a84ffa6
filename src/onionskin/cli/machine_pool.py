"""The verb of pools of machines: `onionskin machine pool`."""

from typing import TYPE_CHECKING, Any

import click

from onionskin.cli import output
from onionskin.cli.arguments import MACHINE_SNAPSHOT, Name, trust_option
from onionskin.cli.ending_options import with_help
from onionskin.cli.output import json_option
from onionskin.errors import StateError

if TYPE_CHECKING:
    from onionskin.machine.machine import Machine
    from onionskin.machine.pool import MachinePool


@with_help
@click.command()
@click.argument("name", type=MACHINE_SNAPSHOT, metavar="STORE/MACHINE@SNAPSHOT")
@click.option("--warm", type=click.IntRange(1, 64), help="How many forks it has ready; by default 4.")
@click.option("--foreground", is_flag=True, help="Be the pool in this process until it ends, for a service manager.")
@click.option("--status", "is_asked", is_flag=True, help="Say how many forks it has ready.")
@click.option("--stop", "is_ended", is_flag=True, help="End it; forks that were taken from it run on.")
@trust_option
@json_option
def pool(name: Name, warm: int | None, foreground: bool, is_asked: bool, is_ended: bool, as_json: bool) -> None:
    """Keep forks of a snapshot ready, so that fork starts nothing.

    A process stays that makes another one for each that fork takes. Until it ends, the snapshot cannot be dropped.
    """
    if foreground + is_asked + is_ended > 1 or (warm is not None and (is_asked or is_ended)):
        raise click.UsageError("give one of --warm, with or without --foreground, --status and --stop")
    with name.open_store() as store:
        machine = store.open_machine(name.volume)
        if foreground:
            machine.be_pool(name.required_snapshot, warm=warm or 4)  # which does not return
        if is_asked:
            _tell(as_json, name, _find(machine, name).status())
            return
        if is_ended:
            _find(machine, name).stop()
            output.tell(as_json, {"source": str(name), "ready": 0}, lambda: f"the pool of {name} has ended")
            return
        _tell(as_json, name, machine.pool(name.required_snapshot, warm=warm or 4).status())


def _find(machine: "Machine", name: Name) -> "MachinePool":
    found = next((one for one in machine.pools() if one.snapshot == name.snapshot), None)
    if found is None:
        raise StateError(f"there is no pool of {name}; start it, with 'onionskin machine pool {name}'")
    return found


def _tell(as_json: bool, name: Name, status: dict[str, Any]) -> None:
    """Print what a pool has."""
    failed = f"; the last one could not be started: {status['failure']}" if status["failure"] else ""
    starting = f", {status['starting']} starting" if status["starting"] else ""
    line = f"{name} has {status['ready']} of {status['warm']} forks ready{starting}, in process {status['pid']}{failed}"
    output.tell(as_json, {"source": str(name), **status}, lambda: line)
