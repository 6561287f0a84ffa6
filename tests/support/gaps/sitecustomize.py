"""Kills a process of a machine in a gap between two steps of its supervisor. It is for supervisors that tests start.

Python loads this at its start where PYTHONPATH names this directory. ONIONSKIN_GAP names a file; while it has a line
"STEP WHEN VICTIM", such as "MachineCut.seal before server", whoever comes there first takes the file away and kills.
"""

import functools
import importlib
import os
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = {
    "os": ("fork",),
    "onionskin.machine.daemon": ("be_supervisor",),
    "onionskin.machine.control": ("ControlServer.__init__",),
    "onionskin.machine.disk_server": ("DiskServer.begin", "DiskServer.wait_ready", "DiskServer.rename"),
    "onionskin.machine.qemu": (
        *("QemuHypervisor.check", "QemuHypervisor.launch", "QemuProcess.note_writes", "QemuProcess.load_state"),
        *("QemuProcess.prepare_state", "QemuProcess.pause", "QemuProcess.save_state", "QemuProcess.resume"),
        *("QemuProcess.finish_state", "QemuProcess._connect"),
    ),
    "onionskin.machine.ram": ("GuestRam.stream", "GuestRam.collect", "UnsavedRam.save", "fill_file"),
    "onionskin.machine.ram_files": ("RamFiles._make", "RamFiles.use"),
    "onionskin.machine.record": ("Record.write",),
    "onionskin.machine.restore": ("Prepared.__init__", "settle"),
    "onionskin.machine.supervisor": ("Supervisor.adopt",),
    "onionskin.machine.running": ("StateFile.save",),
    "onionskin.operations.machine_snapshots": (
        *("MachineCut.check", "MachineCut.seal", "MachineCut.commit", "MachineCut._insert_pins", "MachineCut._write"),
    ),
    "onionskin.operations.machines": ("note_running",),
}
_found: dict[str, Callable[[], int]] = {"supervisor": os.getpid}


def _meet(label: str) -> None:
    """Kill who is to be killed here."""
    path = Path(os.environ["ONIONSKIN_GAP"])
    try:
        where, victim = path.read_text().rsplit(" ", 1)
        if where != label or victim not in _found:
            return
        path.rename(path.with_suffix(".met"))
    except (OSError, ValueError):
        return  # nobody is to be killed, or another process came first
    pid = _found[victim]()
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(10_000)
    os.close(descriptor)


def _with_gaps(step: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def call(*given: Any, **named: Any) -> Any:
        _meet(f"{step} before")
        try:
            return inner(*given, **named)
        finally:
            _meet(f"{step} after")

    return call


def _remember(owner: Any, method: str, victim: str, pid_of: Callable[[Any], int]) -> None:
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        try:
            return inner(self, *given, **named)
        finally:
            if pid_of(self):
                _found[victim] = lambda: pid_of(self)

    setattr(owner, method, call)


def _prepare() -> None:
    for module, steps in STEPS.items():
        loaded = importlib.import_module(module)
        for step in steps:
            owner, _, name = step.rpartition(".")
            holder = getattr(loaded, owner) if owner else loaded
            setattr(holder, name, _with_gaps(step, getattr(holder, name)))
    disk_server, qemu = (importlib.import_module(f"onionskin.machine.{name}") for name in ("disk_server", "qemu"))
    for method in ("__init__", "begin"):
        _remember(disk_server.DiskServer, method, "server", lambda one: one.process.pid if one.process else 0)
    _remember(qemu.QemuProcess, "_connect", "hypervisor", lambda one: one.pid)


if "ONIONSKIN_GAP" in os.environ:
    try:
        _prepare()
    except BaseException:
        traceback.print_exc()
        os._exit(70)  # Python would go on, and nobody would be killed
