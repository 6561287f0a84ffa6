"""A machine of a store, as its user has it: whether it runs or is off.

What runs is asked of its supervisor; what is off, of the store. What must hold: a machine whose supervisor was killed is
found by whatever is asked of it next, and has one again before anything else happens to it.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, timedelta, tzinfo
from functools import wraps
from socket import socket
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from onionskin.base.files import CANNOT_LOOK
from onionskin.base.held import held
from onionskin.base.naming import named, several, some_of
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.sockets import connect_unix
from onionskin.control.client import is_stopped
from onionskin.errors import FormatError, MachineNotFoundError, OnionskinError, StateError
from onionskin.machine import daemon, disk_server, orphans, pool, pool_leftovers, record
from onionskin.machine import fork as fork_process
from onionskin.machine.control import MachineControl, NotAsked
from onionskin.machine.device_state import refuse_damaged
from onionskin.machine.entropy import doubt_about
from onionskin.machine.hypervisor import Configuration, Recorded, compare
from onionskin.machine.pool import MachinePool
from onionskin.machine.record import Record
from onionskin.machine.taken import MachineSnapshot
from onionskin.operations import machine_forks, machine_keeping, machine_tree, machines
from onionskin.operations.forks import check_wanted
from onionskin.operations.prune import Rules

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.base.annotations import MachineState, SnapshotMode, WipePolicy
    from onionskin.catalog import MachineSnapshotRow
    from onionskin.operations.forks import Wanted
    from onionskin.operations.holds import Hold
    from onionskin.operations.machine_tree import MachineSnapshotInfo
    from onionskin.operations.machines import MachineInfo
    from onionskin.operations.prune import Retention
    from onionskin.store import Store

ORPHAN_SECONDS = 10.0
TIMEOUT_SECONDS_MAX = 1_000_000
# So long one who finds a machine between its lock and its socket waits; and so long where who has it says that it begins or
# ends it, and is alive: on a busy host each may take a minute. A start itself has as long.
STARTING_SECONDS = 30.0
STARTING_SECONDS_MAX = daemon.START_SECONDS
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _asked_again(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Call a method again, once, whose supervisor ended between its greeting and the question."""

    @wraps(method)
    def call(*given: _P.args, **named: _P.kwargs) -> _T:
        try:
            return method(*given, **named)
        except NotAsked:
            return method(*given, **named)

    return call


def _refuse_gone(made: "Mapping[str, bytes]", key: str | None) -> None:
    """Raise MachineNotFoundError where a machine is gone that an earlier call under the same key made."""
    if gone := [name for name, id in made.items() if not id]:
        raise MachineNotFoundError(
            f"{some_of(gone)} of the machines that were made under the key {key!r} are gone; what has such a name now is "
            "another machine. Give another key to make new ones"
        )


class Machine:
    """A machine. It holds nothing, so it need not be closed. Any thread may call it.

    `Store.open_machine` returns it.

    Attributes
    ----------
    name : str
        As it was called then.

    Notes
    -----
    Any call raises StateError if the machine was deleted. Those that ask its supervisor raise it too if that does not
    answer, and OSError if its socket cannot be used.
    """

    def __init__(self, store: "Store", name: str, id: bytes | None = None) -> None:
        self._store = store
        self.name: str = name
        # All that is done to it is done by this: what it is called may mean another one by then.
        self._id = machines.find(store._opened.catalog, name).id if id is None else id

    def __repr__(self) -> str:
        return f"<Machine {self.name!r} of {self._store.path}>"

    # ---- looking ----

    @property
    def state(self) -> "MachineState":
        """One of "off", "running", "paused" and "failed"; `status` says why it failed."""
        return cast("MachineState", str(self.status()["state"]))

    @property
    def configuration(self) -> Configuration:
        """What it is made of, beside its disks."""
        return Configuration.from_json(self._row.configuration)

    @property
    def snapshots(self) -> "list[MachineSnapshotInfo]":
        """Its snapshots, oldest first."""
        return machine_tree.list_snapshots(self._store._opened, self._id)

    def info(self) -> "MachineInfo":
        """Return what the store knows of it. Nobody is asked.

        Returns
        -------
        MachineInfo
            Nothing is locked or opened.

        Raises
        ------
        StateError
            It was deleted.
        """
        return machines.machine_info(self._store._opened, self._id)

    @_asked_again
    def status(self) -> dict[str, Any]:
        """Say what it does, and why.

        Returns
        -------
        dict
            As `onionskin machine status --json` shows it. ``state`` and ``why`` are there in any case.
        """
        with self._supervisor() as control:
            if control is not None:
                return dict(control.call("status"))
        ended = self._ended()
        if ended.get("status") in (None, 0) or ended.get("is_forced"):
            return {"name": self._name, "state": "off", "why": ""}
        said = f": {ended['said']}" if ended.get("said") else ""
        return {
            "name": self._name,
            "state": "failed",
            "why": f"its hypervisor ended with {ended['status']}{said}; start it again",
        }

    def _ended(self) -> dict[str, Any]:
        """Return how it ended at last."""
        try:
            value = record.read_json(self._directory / record.ENDED)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in CANNOT_LOOK:
                raise
            return {}
        return value if isinstance(value, dict) and isinstance(value.get("status"), int) else {}

    def console(self) -> socket:
        """Connect to its serial console. One at a time can; the others wait.

        Returns
        -------
        socket.socket
            A connected Unix socket. The caller closes it.

        Raises
        ------
        StateError
            It is off.
        OSError
            There was no connection within 30 seconds.
        """
        with self._running("has no console"):
            return connect_unix(self._directory / "console", seconds=STARTING_SECONDS)

    # ---- running ----

    def start(self, *, paused: bool = False, fresh: bool = False) -> None:
        """Start it. Its guest runs on return, unless it is `paused`; a process stays that supervises it.

        It boots from its disks; or it goes on from RAM, if it was put back to a snapshot or is a fork that never ran.

        Parameters
        ----------
        paused : bool
            Have it stand still from the begin, until `resume`.
        fresh : bool
            Boot in any case, from the disks as they are. RAM that it would go on from is given up, as if the power had gone.

        Raises
        ------
        StateError
            It runs already, it cannot run here, or a disk of it is in use. Nothing of it runs then.
        OSError
            A file could not be read or written, or there is no space (ENOSPC). Nothing of it runs then.
        """
        with self._supervisor() as control:
            if control is not None:
                raise StateError(f"machine {self._name!r} runs already, in process {control.pid}")
        if fresh:
            self._store._forget_ram_of_machine(self._id)
        self._start(paused=paused, only_from=record.DISKS_ALONE if fresh else None)

    def run(self, *, paused: bool = False, fresh: bool = False) -> int:
        """Run it in this process, for a service manager, until it ends.

        Only the main thread can call it. SIGTERM, SIGINT and SIGHUP have the guest shut down. On return, all of it has
        ended and its disks are flushed.

        Parameters
        ----------
        paused : bool
            Have it stand still from the begin, until `resume`.
        fresh : bool
            As for `start`.

        Returns
        -------
        int
            The exit status of the hypervisor: negative if a signal ended it.

        Raises
        ------
        StateError
            It runs already, it cannot run here, or a disk of it is in use. Nothing of it runs then.
        OSError
            A file could not be read or written, or there is no space (ENOSPC). Nothing of it runs then.
        ValueError
            This is not the main thread. Nothing of it runs then.
        """
        with self._supervisor() as control:
            if control is not None:
                raise StateError(f"machine {self._name!r} runs already, in process {control.pid}")
        if fresh:
            self._store._forget_ram_of_machine(self._id)
        return daemon.run_in_foreground(
            self._store.path,
            self._name,
            paused=paused,
            trust=self._store._trust,
            only_from=record.DISKS_ALONE if fresh else None,
            machine=self._id,
        )

    @_asked_again
    def stop(self, timeout: float | None = None, *, force: bool = False) -> None:
        """Have it shut down, and wait until all of it has ended and its disks are flushed. One that is off stays off.

        Parameters
        ----------
        timeout : float, optional
            How many seconds the guest has; by default 90. With `force`: how long the hypervisor has.
        force : bool
            End it without asking its guest, as if the power went.

        Raises
        ------
        StateError
            The guest did not shut down in time. It runs on.
        ValueError
            `timeout` is negative, or longer than 1,000,000 seconds.
        """
        if timeout is not None and not 0 <= timeout <= TIMEOUT_SECONDS_MAX:  # which NaN is not either
            raise ValueError(f"a guest has 0 to {TIMEOUT_SECONDS_MAX:,} seconds to shut down, not {timeout:g}")
        if force and self._end_orphans():
            return
        with self._supervisor() as control:
            if control is not None:
                control.call("stop", timeout=timeout, force=force)

    def pause(self) -> bool:
        """Have it stand still until `resume`, also behind snapshots, and if its supervisor is killed meanwhile.

        Nothing is made durable by this.

        Returns
        -------
        bool
            Whether it ran until now.

        Raises
        ------
        StateError
            It is off; or it could not be stopped in time, because it waits for a disk, and goes on.
        """
        with self._running("cannot be paused") as control:
            return bool(control.call("pause"))

    def resume(self) -> None:
        """Let it go on. Nothing happens to one that runs.

        Raises
        ------
        StateError
            It is off; or a revert of it failed half-way: revert it again, or stop it.
        """
        with self._running("cannot go on") as control:
            control.call("resume")

    def tell(self, hostname: str | None = None, *, clock: bool = True) -> list[str]:
        """Tell the guest, through its agent, who and when it is now.

        Parameters
        ----------
        hostname : str, optional
            Its new host name, until its next boot. With None, it keeps the one that it has.
        clock : bool
            Whether to set its clock to the time of the host.

        Returns
        -------
        list of str
            What could not be done, in words. It is empty if all was done.

        Raises
        ------
        StateError
            It is off, or no agent answers in the guest.
        """
        with self._running("cannot be told anything") as control:
            return list(control.call("tell", hostname=hostname, clock=clock))

    # ---- snapshots ----

    @_asked_again
    def snapshot(
        self, name: str | None = None, note: str = "", *, mode: "SnapshotMode | None" = None, freeze: bool = False
    ) -> MachineSnapshot:
        """Take a snapshot of it: of RAM, devices, disks and configuration at one instant. It goes on if it ran.

        Of a machine that is off, it has disks and configuration, and its mode is "off". Durable on return.

        Parameters
        ----------
        name : str, optional
            By default the time.
        note : str
        mode : {"live", "pause"}, optional
            Whether RAM is collected while it runs; by default where that can be done here.
        freeze : bool
            Have the agent in the guest freeze its file systems meanwhile.

        Returns
        -------
        MachineSnapshot

        Raises
        ------
        SnapshotExistsError
            The name is taken.
        StateError
            It was not taken, and nothing of it remains; but where the supervisor of the machine does not answer, as it was
            stopped, it may be taken when that goes on.
        """
        with self._supervisor() as control:
            if control is not None:
                value = control.call("snapshot", name=name, note=note, mode=mode, freeze=freeze)
                return MachineSnapshot(**{**value, "disks": tuple(value["disks"]), "frozen": tuple(value["frozen"])})
        if mode is not None or freeze:
            raise StateError(
                f"machine {self._name!r} is off, so there is nothing to collect or to freeze; leave it out"
            )
        taken = self._store._snapshot_machine_off(self._id, name, note)
        return MachineSnapshot(taken.name, note, "off", disks=tuple(disk.name for disk in self.info().disks))

    @_asked_again
    def revert(self, name: str) -> None:
        """Put it back to a snapshot. One that runs goes on from there, in the same process; one that is off is started.

        One that is paused stays so. What was written after its last snapshot is gone. Its VM generation id is another one
        then. Durable on return.

        Parameters
        ----------
        name : str
            The snapshot. One of a machine that was off has no RAM: the machine has to be off, and boots.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            The snapshot cannot run here, and the difference is named; or a disk of it is in use: nothing was touched. Or it
            failed half-way: a machine that runs stands still until it is reverted again or stopped, as `status` says; of one
            that is off, another revert or the next start puts all back.
        OSError
            A file could not be read or written. Revert it again, or stop it.
        """
        deadline = time.monotonic() + STARTING_SECONDS_MAX
        while True:
            with self._supervisor() as control:
                if control is not None:
                    control.call("revert", name=name)
                    return
            taken = machines.find_snapshot(self._store._opened.catalog, self._row, name)
            self._refuse_unlike(taken)
            try:
                self._store._revert_machine(self._id, name)
                self._start(only_from=taken.id.hex())
                return
            except StateError:
                # Where somebody was faster to start it, or puts it back just now, what runs then is put back in place.
                if not machines.is_running(self._store._opened, self._row) or time.monotonic() > deadline:
                    raise

    @property
    def _is_kept_paused(self) -> bool:
        """Whether it runs, and its user wants it to stand still."""
        found = Record.read(self._directory)
        return found is not None and found.is_paused

    def revert_to_beginning(self) -> None:
        """Put a fork that is off back to the snapshot that it was made from, and let it go on from there.

        What was written to its disks since is gone, and its own snapshots stay. Durable on return.

        Raises
        ------
        StateError
            It runs, it is no fork, that snapshot is gone or cannot run here, or a disk of it is in use. Nothing was touched.
        OSError
            A file could not be read or written.
        """
        taken = self._refuse_beginning()
        self._store._put_machine_back_to_beginning(self._id)
        self._start(only_from=None if taken.ram is None else record.BEGINNING)

    def _refuse_revert(self, name: str) -> None:
        """Raise what a revert would raise before anything is touched, so far as that can be told without doing it."""
        taken = machines.find_snapshot(self._store._opened.catalog, self._row, name)
        with self._supervisor() as control:
            if control is not None:
                from onionskin.machine.restore import find_saved

                find_saved(self._store, self._row, name)
        self._refuse_unlike(taken)
        if control is None:
            self._refuse_held_disks(but_served=True)

    def _refuse_beginning(self) -> "MachineSnapshotRow":
        """Raise what a revert to the beginning would raise, and return the snapshot of its origin that this is."""
        with self._supervisor() as control:
            if control is not None:
                raise StateError(f"machine {self._name!r} runs; stop it first, with 'onionskin machine stop --force'")
        taken = machine_tree.beginning_of_fork(self._store._opened.catalog, self._row)[1]
        self._refuse_unlike(taken)
        self._refuse_held_disks(but_served=False)
        return taken

    def _refuse_held_disks(self, *, but_served: bool) -> None:
        """Raise StateError where somebody has a disk of a machine that is off; not a server that lets it change."""
        import onionskin
        from onionskin.operations.unflushed import refuse_open

        for volume in machines.disks_of(self._store._opened.catalog, self._row).values():
            is_ours = self._store._open_here(volume) is not None
            if but_served and (is_ours or onionskin.agrees_to_revert(self._store, volume)):
                continue
            refuse_open(self._store._opened, volume)

    def _refuse_unlike(self, snapshot: "MachineSnapshotRow") -> None:
        """Raise StateError where a snapshot that has RAM cannot be loaded here, before anything is put back.

        FormatError: the state of its devices is damaged.
        """
        if snapshot.ram is None:
            return
        from onionskin.machine.qemu import QemuHypervisor

        row = self._row
        disks = self._store._opened.catalog.disks_of_machine(row.id)
        now = QemuHypervisor().check(Configuration.from_json(row.configuration), len(disks))
        recorded = Recorded.from_json(snapshot.recorded)
        compare(recorded, now)
        refuse_damaged(self._store, snapshot.ram, snapshot.state_bytes, recorded)

    def merge(self, names: "str | Sequence[str]") -> list[str]:
        """Drop snapshots of it, and keep all data: what was written after each joins what was written before it.

        It may run. Durable on return.

        Parameters
        ----------
        names : str or sequence of str
            A snapshot, or several: then all are dropped in one transaction, or none is.

        Returns
        -------
        list of str
            Their names, in the order in which they were taken.

        Raises
        ------
        SnapshotNotFoundError
            There is none of a name.
        StateError
            The machine, or a fork that never ran, is about to go on from one of them; or somebody holds one of them.
        ValueError
            The sequence is empty.
        """
        self._refuse_pooled(names)
        with self._supervisor():
            return self._store._merge_machine_snapshots(self._id, names)

    def discard(self, names: "str | Sequence[str]", *, recursive: bool = False) -> list[str]:
        """Drop snapshots of it, and all that was written after them on their branches.

        It may run, if it does not stand on one of them. One that is off and stands on one reads as that did, and boots
        at its next start. Durable on return.

        Parameters
        ----------
        names : str or sequence of str
            A snapshot, or several: then all are dropped in one transaction, or none is.
        recursive : bool
            Also drop the snapshots that were taken after them.

        Returns
        -------
        list of str
            The names of all that were dropped, in the order in which they were taken.

        Raises
        ------
        SnapshotNotFoundError
            There is none of a name.
        StateError
            It runs on one of them, snapshots were taken after them and `recursive` is not given, a fork that never ran
            is about to go on from one, or one is held or needed by another volume. Nothing was dropped.
        ValueError
            The sequence is empty.
        """
        self._refuse_pooled(names, recursive=recursive)
        with self._supervisor():
            return self._store._discard_machine_snapshots(self._id, names, recursive=recursive)

    # ---- which snapshots stay, and what they are called ----

    def hold(self, snapshot: "str | Sequence[str]", holder: str) -> None:
        """Hold snapshots of it, so that neither they nor the machine can be removed.

        One that is held cannot be discarded, merged or deleted before every holder has let it go, and neither can what it
        has of a disk or of RAM. Its name and its note may still change. Durable on return. The machine may run.

        Parameters
        ----------
        snapshot : str or sequence of str
            A snapshot, or several: then all are held in one transaction, or none is.
        holder : str
            A name for who needs them, which the error of a refused operation shows. It has at most 255 bytes, without '/',
            '@' and control characters.

        Raises
        ------
        SnapshotNotFoundError
            There is none of a name.
        StateError
            This holder holds one of them already; or one has neither disks nor RAM.
        ValueError
            The sequence is empty, or the name of the holder is not valid.
        """
        machine_keeping.hold(self._store._opened, self._id, several("snapshot", snapshot), named("holder", holder))

    def unhold(self, snapshot: "str | Sequence[str]", holder: str) -> None:
        """Let snapshots of it go that `hold` held. Durable on return. The machine may run.

        Parameters
        ----------
        snapshot : str or sequence of str
            A snapshot, or several: then all are let go in one transaction, or none is.
        holder : str
            Who held them.

        Raises
        ------
        SnapshotNotFoundError
            There is none of a name.
        StateError
            This holder does not hold one of them.
        ValueError
            The sequence is empty.
        """
        machine_keeping.unhold(self._store._opened, self._id, several("snapshot", snapshot), named("holder", holder))

    def holds(self, snapshot: str | None = None) -> "list[Hold]":
        """Return who holds a snapshot of it, or any of them.

        Parameters
        ----------
        snapshot : str, optional
            By default, all of them.

        Returns
        -------
        list of Hold
            In the order in which the snapshots were taken, and held. Who holds the snapshot of one of its disks counts.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        """
        return machine_keeping.holds(self._store._opened, self._id, snapshot)

    def rename_snapshot(self, old: str, new: str) -> None:
        """Give a snapshot of it another name, and those of its disks and its RAM too. Holds and forks of it stay.

        Durable on return. The machine may run.

        Parameters
        ----------
        old : str
            The current name of the snapshot.
        new : str
            The new name: at most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        SnapshotExistsError
            The new name is taken, on the machine or on one of its disks.
        ValueError
            The new name is not valid.
        """
        machine_keeping.rename_snapshot(self._store._opened, self._id, named("snapshot", old), named("snapshot", new))

    def set_note(self, snapshot: str, note: str) -> None:
        """Replace the note of a snapshot of it, and of those of its disks and its RAM. Durable on return.

        Parameters
        ----------
        snapshot : str
            The snapshot.
        note : str
            The new note, of at most 64 KiB. An empty string takes the note away.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        """
        machine_keeping.set_note(self._store._opened, self._id, named("snapshot", snapshot), note)

    def prune(
        self,
        *,
        keep_last: int = 0,
        keep_hourly: int = 0,
        keep_daily: int = 0,
        keep_weekly: int = 0,
        keep_monthly: int = 0,
        keep_yearly: int = 0,
        keep_within: timedelta | None = None,
        zone: tzinfo = UTC,
        dry_run: bool = False,
    ) -> "list[Retention]":
        """Drop the snapshots of it that no rule keeps. The rules are those of restic, as `Store.prune` has them.

        One is kept if at least one rule keeps it, if it is held, or if the machine or a fork that never ran is about to go on
        from it. The others are dropped as by `merge`, in one transaction, or none is. The machine may run. Durable on
        return.

        Parameters
        ----------
        keep_last : int
            Keep this many of the newest snapshots. For this and the following rules, -1 means all, and 0 means no rule.
        keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly : int
            Of the last hours (days, weeks of ISO 8601, ...) that have snapshots, take this many, and keep the newest
            snapshot of each. If there are fewer of them, keep the oldest snapshot too.
        keep_within : datetime.timedelta, optional
            Keep all snapshots that are older than the newest one by at most this time.
        zone : datetime.tzinfo
            The time zone that defines where an hour and a day end.
        dry_run : bool
            Drop nothing, and only return what would be dropped.

        Returns
        -------
        list of Retention
            One for each snapshot, in the order in which they were taken. Those that nothing keeps are dropped.

        Raises
        ------
        ValueError
            No rule is given, or a rule is not valid.
        StateError
            A snapshot was renamed meanwhile. None was dropped.
        """
        rules = Rules(keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, keep_within, zone)
        rules.check()
        pooled = self._pooled()
        if dry_run:
            return [one for _, one in machine_keeping.planned(self._store._opened, self._id, rules, pooled)]

        def merge(going: "Sequence[MachineSnapshotRow]") -> None:
            names, ids = [row.name for row in going], [row.id for row in going]
            self._store._merge_machine_snapshots(self._id, names, ids)

        with self._supervisor():
            return machine_keeping.prune(self._store._opened, self._id, rules, merge, pooled)

    def delete(self, *, recursive: bool = False) -> int:
        """Remove it, while it is off, with its RAM and, if it is a fork, its disks. Other disks stay as they are.

        Durable on return.

        Parameters
        ----------
        recursive : bool
            Remove its snapshots too, if it has any.

        Returns
        -------
        int
            The bytes on the disk of the data that goes.

        Raises
        ------
        StateError
            It runs, it has snapshots and `recursive` is not given, other machines were forked from it, or somebody
            holds a snapshot of a disk. Nothing was removed.
        """
        with self._supervisor() as control:
            if control is not None:
                raise StateError(f"machine {self._name!r} runs; stop it first")
        self._end_left_in_pools()
        directory = self._directory
        freed = self._store._delete_machines([self._id], recursive=recursive)
        record.remove_directory(directory)
        return freed

    def fork(
        self,
        snapshot: str,
        *,
        count: int | None = None,
        names: "Sequence[str] | None" = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
        network: bool = False,
        start: bool = True,
    ) -> "list[Machine]":
        """Make machines that go on from a snapshot of it, and start them. All run on return, or none is left.

        It warns (RuntimeWarning) where the guest's kernel is one by which forks draw the same random numbers.

        Parameters
        ----------
        snapshot : str
        count, names, pattern, lifetime, labels, wipe
            As for `Store.fork_machine`.
        idempotency_key : str, optional
            As for `Store.fork_machine`. The same call again starts those that were made and have not run yet. With a key,
            machines that could not be started stay.
        network : bool
            Let them reach what the machine reaches. By default the network of a fork reaches nothing: it has the addresses
            of the machine that it was made from.
        start : bool
            Whether they are started.

        Returns
        -------
        list of Machine
            In the order of `names` or of the numbers.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        MachineExistsError, VolumeExistsError
            A name is taken, of a machine or of a volume that it would have.
        StateError
            One of them cannot run here.
        OSError
            A file could not be read or written, or there is no space (ENOSPC).
        ValueError
            The arguments do not say which machines to make.
        """
        forks = None
        wanted = check_wanted(self._name, snapshot, names, count, pattern, idempotency_key, lifetime, labels, wipe)
        if start and not network and wipe is None and idempotency_key is None:  # what waits in a pool has none of these
            forks = self._fork_from_pool(wanted)
        if forks is None:
            forks, may_have_run = [], idempotency_key is not None
            try:
                with DeferredInterrupt():  # between the commit and this knowing of the forks
                    made = machine_forks.fork_machine(self._store._opened, wanted, of=self._id)
                    _refuse_gone(made, idempotency_key)
                    forks = [Machine(self._store, name, id) for name, id in made.items()]
                self._begin_forks(forks, network=network, start=start, may_have_run=may_have_run)
            except BaseException:
                if not may_have_run:
                    self._remove(forks)
                raise
        if doubt := self._doubt_about(snapshot):
            warnings.warn(f"forks of {self._name}@{snapshot}: {doubt}", RuntimeWarning, stacklevel=2)
        return forks

    def _begin_forks(self, forks: "list[Machine]", *, network: bool, start: bool, may_have_run: bool) -> None:
        """Start forks that were made. `may_have_run`: the same call may have made and started them before."""
        new = [fork for fork in forks if fork._never_ran] if may_have_run else forks
        for fork in new if network else ():
            fork._configure(lambda one: replace(one, is_isolated=False))
        if start:
            self._start_forks(new)

    def _fork_from_pool(self, wanted: "Wanted") -> "list[Machine] | None":
        """Make forks of which a pool has the first ones ready. Return None, and leave nothing, where no pool can help."""
        catalog = self._store._opened.catalog
        taken = catalog.machine_snapshot_named(self._id, wanted.snapshot or "")
        if taken is None:
            return None
        with pool.taken(self._directory, taken.id, wanted.count) as waiting:
            if not waiting:
                return None
            forks: list[Machine] = []
            try:
                with DeferredInterrupt():
                    made = machine_forks.fork_machine(self._store._opened, wanted, waiting, of=self._id)
                    forks = [Machine(self._store, name, id) for name, id in made.items()]
                cold = [fork for fork in forks if fork._id not in waiting]
                if not self._adopt([fork for fork in forks if fork._id in waiting]):
                    self._remove(forks)
                    return None
                fork_process.start_all(self._store, [fork._id for fork in cold])
            except BaseException:
                self._remove(forks)
                raise
            return forks

    def _adopt(self, forks: "list[Machine]") -> bool:
        """Tell supervisors of machines that waited in a pool which forks they are. Return whether all guests run."""
        with ExitStack() as stack:
            try:
                found = [MachineControl.find(fork._directory / record.CONTROL, fork.name) for fork in forks]
                controls = [stack.enter_context(one) for one in found if one is not None]
                if len(controls) < len(forks):
                    return False
                for control in controls:
                    control.ask("adopt")
                for control in controls:
                    control.answer()
            except (OSError, OnionskinError):
                return False
        return True

    def pool(self, snapshot: str, *, warm: int = 4) -> MachinePool:
        """Start a process that has forks of a snapshot ready, for `fork` to take. They are ready on return.

        A fork that takes a machine has nothing to start, and the process makes another one. It goes on until `stop` of what
        is returned, or the end of its context. As long as it does, the snapshot cannot be dropped.

        Parameters
        ----------
        snapshot : str
        warm : int
            How many machines, 1 to 64. Each has the processes of a machine that runs, and stands still.

        Returns
        -------
        MachinePool

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            There is a pool of that snapshot, or it cannot run here.
        OSError
            A file could not be read or written, or there is no space (ENOSPC).
        ValueError
            `warm` is out of range.
        """
        self._end_left_in_pools()
        return pool.start(self._store, self._id, snapshot, warm)

    def be_pool(self, snapshot: str, *, warm: int = 4) -> None:
        """Replace this process by that of a pool, for a service manager. SIGTERM ends it. See `pool`.

        Parameters
        ----------
        snapshot : str
        warm : int

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        ValueError
            `warm` is out of range.
        """
        self._end_left_in_pools()
        pool.become(self._store, self._id, snapshot, warm)

    def pools(self) -> list[MachinePool]:
        """Return the pools of its snapshots that there are now.

        Returns
        -------
        list of MachinePool
            By the age of their snapshots. What one that was killed left is ended first.
        """
        self._end_left_in_pools()
        rows = self._store._opened.catalog.snapshots_of_machine(self._id)
        return [one for row in rows if (one := MachinePool(self._directory, row.name, row.id)).is_there]

    def _pooled(self) -> set[bytes]:
        """Return the ids of the snapshots of which pools make forks. What one that was killed left is ended first."""
        self._end_left_in_pools()
        return {row.id for row in pool.pooled(self._store, self._id)}

    def _refuse_pooled(self, names: "str | Sequence[str]", *, recursive: bool = False) -> None:
        """Raise StateError where a pool makes forks of one of these snapshots, or of those after them."""
        self._end_left_in_pools()
        catalog = self._store._opened.catalog
        with catalog.reading():
            machine = machines.find(catalog, self._id)
            wanted = several("snapshot", names)
            going = machine_tree.chosen(catalog, machine, wanted)
            if recursive:
                going = machine_tree.going_with(catalog, machine, wanted, recursive=True)
        pool.refuse_pooled(self._store, machine, {row.id for row in going})

    def _end_left_in_pools(self) -> None:
        """End the machines that waited in pools of this one which were killed, and whose supervisors were killed too."""
        if not self._store.read_only:
            pool_leftovers.end_of(self._store, self._row)

    def _start_forks(self, forks: "list[Machine]") -> None:
        try:
            if forks:
                fork_process.start_all(self._store, [fork._id for fork in forks])
        except StateError:
            # The same call in another process may have been faster.
            if not all(machines.is_running(self._store._opened, fork._row) for fork in forks):
                raise

    @property
    def _never_ran(self) -> bool:
        """Whether it is a fork that is off, and has not been started."""
        row = self._row
        is_new = row.stands_on is None and row.resumes == machines.RESUMES
        return is_new and not machines.is_running(self._store._opened, row)

    def _doubt_about(self, snapshot: str) -> str:
        """Say what is to be expected of the random numbers of forks of a snapshot; nothing where all is well."""
        row = self._store._opened.catalog.machine_snapshot_named(self._id, snapshot)
        if row is None or row.ram is None:
            return ""
        try:
            return doubt_about(Recorded.from_json(row.recorded).guest_kernel)
        except FormatError:  # the forks are made; their start says what is wrong
            return ""

    def _remove(self, forks: "list[Machine]") -> None:
        """End forks that were made, and leave nothing of them, also where their start is under way: Ctrl-C ended the call."""
        if not forks:
            return
        deadline = time.monotonic() + STARTING_SECONDS_MAX
        while True:
            for fork in forks:
                with suppress(OSError, OnionskinError):  # one that runs still is not deleted, which says so
                    fork.stop(force=True)
            try:
                self._store._delete_machines([fork._id for fork in forks], recursive=True)
                break
            except StateError:
                has_begun = any(machines.is_running(self._store._opened, fork._row) for fork in forks)
                if not has_begun or time.monotonic() > deadline:
                    raise
        for fork in forks:
            record.remove_directory(fork._directory)

    def _configure(self, change: Callable[[Configuration], Configuration]) -> None:
        store = self._store._opened

        def write() -> None:
            row = store.catalog.machine_with_id(self._id)
            if row is not None:
                changed = change(Configuration.from_json(row.configuration))
                store.catalog.update_machine(self._id, configuration=changed.to_json())

        store.change(write)

    # ---- the supervisor ----

    @property
    def _row(self) -> Any:
        row = self._store._opened.catalog.machine_with_id(self._id)
        if row is None:
            raise StateError(f"machine {self.name!r} of {self._store.path} was deleted")
        return row

    @property
    def _name(self) -> str:
        """What it is called now."""
        return str(self._row.name)

    @property
    def _directory(self) -> "Path":
        return record.directory_of(self._store._opened.layout.root, self._id)

    def _start(self, *, paused: bool = False, only_from: str | None = None) -> None:
        directory = record.make_directory(self._store._opened.layout.root, self._id)
        daemon.start(
            *(self._store.path, self._name, directory),
            paused=paused,
            trust=self._store._trust,
            only_from=only_from,
            machine=self._id,
        )

    @held
    def _running(self, what: str) -> Iterator[MachineControl]:
        with self._supervisor() as control:
            if control is None:
                raise StateError(f"machine {self._name!r} is off, so it {what}; start it first")
            yield control

    @held
    def _supervisor(self) -> Iterator[MachineControl | None]:
        """Connect to its supervisor, or yield None where it is off. One that was killed is followed by another."""
        control = self._find()
        if control is None:
            yield None
            return
        with control:
            yield control

    def _find(self) -> MachineControl | None:
        begun = time.monotonic()
        while True:
            if (control := self._connected()) is not None:
                return control
            found = Record.read(self._directory)
            is_there = found is not None and found.hypervisor is not None and found.hypervisor.is_alive
            if not is_there and not machines.is_running(self._store._opened, self._row):
                self._end_leftovers(found)
                return None
            # Somebody starts it or ends it just now, or did until a moment ago.
            waited = time.monotonic() - begun
            if waited > STARTING_SECONDS and not (waited < STARTING_SECONDS_MAX and self._is_under_way()):
                raise self._silent(found, waited)
            if is_there and found is not None and (found.supervisor is None or not found.supervisor.is_alive):
                self._refuse_of_another_user(record.RECORD, ", and its supervisor was killed")
                if found.is_waiting and not machine_forks.is_taken(self._row):
                    self._end_orphans()  # no fork can take it from its pool any more
                    continue
                self._take_over()  # it is looked for again however long that took
            else:
                time.sleep(0.02)

    def _connected(self) -> MachineControl | None:
        """Connect to its supervisor, or return None where none listens that this user may ask.

        StateError: it is another user's, as in the store of a group.
        """
        try:
            return MachineControl.find(self._directory / record.CONTROL, self._name)
        except PermissionError:
            if not machines.is_running(self._store._opened, self._row):
                return None  # it was left by one that was killed
            self._refuse_of_another_user(record.CONTROL)
            raise

    def _refuse_of_another_user(self, file: str, more: str = "") -> None:
        """Raise StateError where another user runs it, whose file that is; but root may do everything."""
        with suppress(FileNotFoundError):
            user = (self._directory / file).stat().st_uid
            if os.geteuid() not in (0, user):
                raise StateError(
                    f"machine {self._name!r} runs as user {user}{more}; that user alone, or root, can do something with it: "
                    "have it stopped there, and start it"
                )

    def _is_under_way(self) -> bool:
        """Whether who begins or ends it just now is alive, and was not stopped by a signal."""
        who = record.who_is_under_way(self._directory)
        return who is not None and not is_stopped(who.pid)

    def _take_over(self) -> None:
        """Have a supervisor take over what runs."""
        try:
            self._start()
        except StateError:  # somebody else may have been faster, and have it by now
            if not machines.is_running(self._store._opened, self._row):
                raise

    def _silent(self, found: Record | None, waited: float) -> StateError:
        """Say that somebody has the machine who cannot be reached, and what ends that."""
        supervisor = (
            found.supervisor if found is not None else None
        )  # it goes with the directory, where that was removed
        pid = supervisor.pid if supervisor is not None and supervisor.is_alive else self.info().pid
        if pid is not None:
            return StateError(
                f"machine {self._name!r} runs in process {pid}, which nobody can reach at "
                f"{self._directory / record.CONTROL}; 'kill {pid}' has its guest shut down"
            )
        said = machines.said_to_run(self._store._opened, self._row)
        return StateError(f"{said}; it has answered nobody for {waited:.0f} s")

    def _end_orphans(self) -> bool:
        """End what a killed supervisor left, also where it answers nothing. Return whether there was anything."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            found = Record.read(self._directory)
            if found is None or found.hypervisor is None or not found.hypervisor.is_alive:
                return False
            if found.supervisor is not None and found.supervisor.is_alive:
                return False
            self._refuse_of_another_user(record.RECORD, ", and its supervisor was killed")
            if not machines.is_running(self._store._opened, self._row):
                break
            # The threads of a process that was killed may hold its locks for a moment longer than it is there.
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        found.hypervisor.end(ORPHAN_SECONDS)
        self._end_leftovers(found)
        (self._directory / record.RECORD).unlink(missing_ok=True)
        return True

    def _end_leftovers(self, found: Record | None) -> None:
        """End what is left of a machine that is off: its processes were killed, or its supervisor was."""
        if found is not None and found.server is not None:
            found.server.end(disk_server.END_SECONDS)
        if not orphans.are_there(self._directory):
            return
        try:
            with self._store._open_ram(self._row):
                orphans.end(self._directory)
        except OnionskinError:  # somebody has it now, whose they are; or it is damaged, which who needs it is told
            return


__all__ = ["Machine", "MachineSnapshot"]
