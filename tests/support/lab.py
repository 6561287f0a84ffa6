"""A machine with the guest of tick.S that runs in the process of a test, without a supervisor: see `LabMachine`."""

from pathlib import Path
from typing import Self

import numpy as np
from support.guests import Console, configuration
from support.servers import Serve

import onionskin
from onionskin.base.dtypes import PAGE_RUN
from onionskin.machine import restore
from onionskin.machine.hypervisor import Configuration, Identity
from onionskin.machine.qemu import QemuHypervisor, QemuProcess
from onionskin.machine.ram import GuestRam
from onionskin.machine.running import Running
from onionskin.operations import machines

MEMORY = 16  # MiB


class LabMachine:
    """One machine of a store. A context manager, which ends it.

    Attributes
    ----------
    process, running, console
        While it runs.
    """

    process: QemuProcess
    running: Running
    console: Console

    def __init__(self, store: onionskin.Store, name: str, directory: Path) -> None:
        self.store = store
        self.name = name
        self.directory = directory
        self._ends: list[object] = []

    @classmethod
    def make(
        cls,
        store: onionskin.Store,
        name: str,
        disks: list[str],
        directory: Path,
        qemu: list[str],
        wipe: str | None = None,
        made: Configuration | None = None,
    ) -> Self:
        """Make the machine in the store."""
        made = made or configuration(qemu, MEMORY)
        machines.create(
            store._opened, name, disks, configuration=made.to_json(), memory_bytes=made.memory_bytes, wipe=wipe
        )
        return cls(store, name, directory)

    def start(self, *, paused: bool = False) -> Self:
        """Start it: from its disks, or from RAM where the store says so."""
        opened = self.store._opened
        row = machines.find(opened.catalog, self.name)
        made = Configuration.from_json(row.configuration)
        names = [volume.name for volume in machines.volumes_of(opened.catalog, row)[:-1]]
        hypervisor, identity = QemuHypervisor(), Identity()
        recorded = hypervisor.check(made, len(names))
        self.directory.mkdir(parents=True, exist_ok=True)
        socket = self.directory / "nbd"
        socket.unlink(missing_ok=True)
        begins = machines.beginning(opened, self.name)
        prepared = (
            restore.Prepared(self.store, restore.find_fit(self.store, row, None, recorded)) if begins.ram else None
        )
        if prepared:
            prepared.read_state()
        volume = self.store._open_ram(row)
        self._server = Serve(
            *(f"{self.store.path}/{disk}" for disk in names),
            *("--socket", socket, "--allow-revert"),
            log=self.directory / "serve.log",
        )
        self._server.__enter__()
        self.process = hypervisor.launch(
            made,
            name=self.name,
            directory=self.directory,
            ram_file=prepared.ram_file.path if prepared else None,
            disks=[f"nbd+unix:///{disk}?socket={socket}" for disk in names],
            state=prepared.state.path if prepared else None,
            identity=identity,
        )
        self.running = Running.attach(
            *(self.store, self.name, self.process, volume, made, recorded, identity, self.directory),
            mapped=prepared.saved.layer if prepared else None,
        )
        if prepared:
            restore.settle(self.running, prepared.saved)
            prepared.close()
        machines.note_running(opened, row.id)
        self.console = Console(self.directory / "console")
        if not paused:
            self.process.resume()
        return self

    def whole(self) -> np.ndarray:
        """Return all of RAM as it is now."""
        ram = self.running.guest_ram
        assert isinstance(ram, GuestRam)
        room = np.empty(ram.length, np.uint8)
        ram._tracker.read(np.array([(0, ram.length)], PAGE_RUN), room)
        return room

    def stop(self) -> None:
        """End it, as if the power went."""
        self.process.quit(0)
        self.console.__exit__()
        self.running.close()
        self.running.ram_volume.close()
        self._server.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
