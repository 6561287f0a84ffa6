"""Kills a process of a machine in a gap between two steps of its supervisor. It is for supervisors that tests start.

Python loads this at its start where PYTHONPATH names this directory. ONIONSKIN_GAP names a file; while it has a line
"STEP WHEN VICTIM", such as "MachineCut.seal before server", whoever comes there first takes the file away and kills. Steps of
the server of the disks are there too, and of the command line: whoever is there can kill itself. A victim may be the
number of a process, too. ONIONSKIN_GAP_RESTARTS says how often a server of disks may die within a minute.
"""

import functools
import importlib
import os
import select
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

STEPS = {
    "os": ("fork",),
    "onionskin.machine.daemon": ("be_supervisor", "start"),
    "onionskin.machine.control": ("ControlServer.__init__", "ControlServer.close", "MachineControl.ask"),
    "onionskin.machine.disk_server": (
        *("DiskServer.begin", "DiskServer.wait_listening", "DiskServer.wait_ready", "DiskServer.rename"),
        *("DiskServer.restart", "DiskServer.end"),
    ),
    "onionskin.machine.qemu": (
        *("QemuHypervisor.check", "QemuHypervisor.launch", "QemuProcess.note_writes", "QemuProcess.load_state"),
        *("QemuProcess.prepare_state", "QemuProcess.pause", "QemuProcess.save_state", "QemuProcess.resume"),
        *("QemuProcess.finish_state", "QemuProcess._connect", "QemuProcess.meet_library", "QemuProcess.drop_leftovers"),
        *(
            "QemuProcess._add_node",
            "QemuProcess.open_state",
            "QemuProcess._run_on_state",
            "QemuProcess._remove_node",
            "QemuProcess.quit",
        ),
        *("QemuProcess.plugged", "QemuProcess.close"),
    ),
    "onionskin.machine.ram": (
        *("GuestRam.stream", "GuestRam.collect", "UnsavedRam.save", "GuestRam.note_written", "GuestRam.drop"),
        "fill_file",
    ),
    "onionskin.machine.ram_files": ("RamFiles._make", "RamFiles.use", "RamFiles.make_soon"),
    "onionskin.machine.capture": ("_NodeOfState.let_go", "_finish_state"),
    "onionskin.machine.record": ("Record.write", "Record.stage", "Staged.put", "note_under_way", "note_reachable"),
    "onionskin.machine.restore": (
        *(
            "Prepared.__init__",
            "Prepared.read_state",
            "settle",
            "_settle",
            "renew_generation",
            "_VolumesGoingBack.finish",
        ),
        "_VolumesGoingBack._note_changed",
    ),
    "onionskin.machine.supervisor": ("Supervisor.adopt", "Supervisor._take_over"),
    "onionskin.machine.running": (
        *("StateFile.save", "Stop.refuse_disturbed", "Stop.refuse_went_on", "Running.attach", "Running.close"),
        "Running.refuse_other_devices",
    ),
    "onionskin.store": ("HeldRam.open",),
    "onionskin.operations.machine_snapshots": (
        *("MachineCut.check", "MachineCut.seal", "MachineCut.commit", "MachineCut._insert_pins", "MachineCut._write"),
    ),
    "onionskin.operations.machine_tree": (
        *("RevertInPlace.put_disks_back", "RevertInPlace.put_ram_back", "revert", "merge", "discard"),
    ),
    "onionskin.operations.machines": ("note_running", "note_reverting", "note_reverted"),
    "onionskin.operations.machine_forks": ("fork_machine", "make_waiting"),
    "onionskin.operations.machine_removal": ("delete",),
    "onionskin.machine.fork": ("start_all", "_ask"),
    "onionskin.machine.loaded_qemu": ("LoadedQemu._hand_over", "LoadedQemu._let_go_on"),
    # In the server of the disks:
    "onionskin.control.groups": ("seal_for_caller", "_enter", "_seal", "_sync"),
    "onionskin.operations.group_member": ("MemberSealing.give", "MemberSealing.resolve", "MemberSealing.settle"),
    "onionskin.operations.restart": (
        *("_Restart.prepare_on", "_Restart.change", "_Restart.remove_old", "_Restart.resolve"),
    ),
}
_found: dict[str, Callable[[], int]] = {"supervisor": os.getpid, "itself": os.getpid}


def _meet(label: str) -> None:
    """Kill who is to be killed here."""
    path = Path(os.environ["ONIONSKIN_GAP"])
    try:
        where, victim = path.read_text().rsplit(" ", 1)
        if where != label or not (victim.isdigit() or victim in _found):
            return
        pid = int(victim) if victim.isdigit() else _found[victim]()
        descriptor = os.pidfd_open(pid)
    except (OSError, ValueError):
        return  # nobody is to be killed, or is there
    try:
        path.rename(path.with_suffix(".met"))
    except OSError:
        os.close(descriptor)
        return  # another process came first
    with suppress(ProcessLookupError):  # it has ended by itself
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(10_000)
    os.close(descriptor)


def _with_gaps(step: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def call(*given: Any, **named: Any) -> Any:
        _remember(*given[:1])
        _meet(f"{step} before")
        try:
            return inner(*given, **named)
        finally:
            _remember(*given[:1])
            _meet(f"{step} after")

    return call


def _remember(one: Any = None) -> None:
    """Take note of who can be killed from here on."""
    kind = type(one).__name__
    if kind in ("QemuProcess", "LoadedQemu"):
        _found["hypervisor"] = lambda: one.pid
    elif kind == "DiskServer":
        _found["server"] = lambda: one.process.pid if one.process else -1
    elif kind == "Supervisor":
        _remember(one._server)


def _prepare() -> None:
    for module, steps in STEPS.items():
        loaded = importlib.import_module(module)
        for step in steps:
            owner, _, name = step.rpartition(".")
            holder = getattr(loaded, owner) if owner else loaded
            setattr(holder, name, _with_gaps(step, getattr(holder, name)))
    if "ONIONSKIN_GAP_RESTARTS" in os.environ:
        importlib.import_module("onionskin.machine.disk_server").RESTARTS_MAX = int(
            os.environ["ONIONSKIN_GAP_RESTARTS"]
        )


if "ONIONSKIN_GAP" in os.environ:
    try:
        _prepare()
    except BaseException:
        traceback.print_exc()
        os._exit(70)  # Python would go on, and nobody would be killed
