"""The steps of what is done to a machine, between which a process of it is killed: `gap.py` has it done."""

OF_A_SNAPSHOT = (
    *("GuestRam.stream", "MachineCut.check", "QemuProcess.prepare_state", "GuestRam.collect", "QemuProcess.pause"),
    *("MachineCut.seal", "QemuProcess.save_state", "QemuProcess.resume", "QemuProcess.finish_state"),
    *("UnsavedRam.save", "StateFile.save", "MachineCut._insert_pins", "MachineCut._write", "MachineCut.commit"),
    *("Record.write", "QemuProcess._add_node", "QemuProcess._run_on_state", "QemuProcess._remove_node"),
    *("Stop.refuse_disturbed", "Running.refuse_other_devices", "RamFiles.make_soon"),
    *("_NodeOfState.let_go", "_finish_state"),
)
OF_A_START = (
    *("QemuHypervisor.check", "RamFiles.use", "fork", "be_supervisor", "Prepared.__init__", "DiskServer.begin"),
    *(
        "QemuHypervisor.launch",
        "DiskServer.wait_listening",
        "DiskServer.wait_ready",
        "QemuProcess._connect",
        "QemuProcess.note_writes",
        "QemuProcess.load_state",
    ),
    *("settle", "Record.write", "note_running", "QemuProcess.resume", "ControlServer.__init__"),
    *("QemuProcess.meet_library", "QemuProcess.open_state", "QemuProcess._run_on_state", "Running.attach"),
    *("note_under_way", "note_reachable", "HeldRam.open", "Prepared.read_state"),
)
# Of a fork whose supervisor waited for a machine.
OF_A_SPARE = ("LoadedQemu._hand_over", "LoadedQemu._let_go_on")
# From where on the hypervisor has its disks, and waits for a server of them that has died.
WITH_DISKS = [
    f"QemuProcess.{one}" for one in ("_connect after", "note_writes before", "note_writes after", "load_state before")
]
OF_A_POOL = ("Supervisor.adopt", "DiskServer.rename", "QemuProcess.resume", "Record.write")
OF_A_REVERT = (
    *("Record.write", "Running.refuse_other_devices", "QemuProcess._add_node", "QemuProcess.pause"),
    *("GuestRam.note_written", "RevertInPlace.put_disks_back", "GuestRam.drop", "QemuProcess._run_on_state", "_settle"),
    *("renew_generation", "Stop.refuse_went_on", "RevertInPlace.put_ram_back", "QemuProcess.resume"),
    *("QemuProcess._remove_node", "_VolumesGoingBack.finish", "_VolumesGoingBack._note_changed"),
    *("Record.stage", "Staged.put"),
)
OF_A_PAUSE = ("QemuProcess.pause", "Record.write")
OF_A_RESUME = ("QemuProcess.resume", "Record.write")
OF_A_STOP = (
    *("QemuProcess.quit", "ControlServer.close", "Running.close", "QemuProcess.close", "DiskServer.end"),
    *("note_under_way", "note_reachable"),
)
OF_A_TAKEOVER = (
    *("QemuProcess._connect", "QemuProcess.drop_leftovers", "QemuProcess.meet_library"),
    *("QemuProcess.note_writes", "Running.attach", "Record.write", "ControlServer.__init__"),
)
OF_A_RESTART = ("DiskServer.restart", "DiskServer.begin", "DiskServer.wait_ready", "Record.write")
OF_A_SERVER_THAT_CUTS = (
    "seal_for_caller",
    "_enter",
    "MemberSealing.give",
    "MemberSealing.resolve",
    "MemberSealing.settle",
)
OF_A_SERVER_THAT_REVERTS = ("_Restart.prepare_on", "_Restart.change", "_Restart.remove_old", "_Restart.resolve")
# Of the command that forks, beside what the processes of the forks do.
OF_WHO_FORKS = ("fork_machine", "start_all", "_ask")
OF_WHO_ASKS = ("MachineControl.ask",)


def places_of(steps: tuple[str, ...]) -> list[str]:
    """Return the gaps before and after each step. Behind the end of a supervisor nobody can be met."""
    found = [f"{step} {when}" for step in steps for when in ("before", "after")]
    return [one for one in found if one != "be_supervisor after"]
