"""What a machine is made of, what a hypervisor can do, and whether a snapshot of a machine can run here.

`Hypervisor` and `Process` are what another hypervisor has to offer; `onionskin.machine.qemu` is the one that exists.

What must hold: a configuration that is read back is checked as one that is given. Whatever decides whether a snapshot runs
here is in `Recorded`, and `compare` is asked before anything is touched: QEMU takes the state of another CPU model without
a word, and the guest dies.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

from onionskin.errors import FormatError, StateError

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.machine.monitor import Monitor, Standstill
    from onionskin.machine.preload import Preload
    from onionskin.machine.ram import GuestRam

MEMORY_BYTES_MIN = 1 << 20
MEMORY_BYTES_MAX = 1 << 42
MEMORY_UNIT = 1 << 20  # QEMU takes whole mebibytes
CPUS_MAX = 255
NETWORKS = ("none", "user")


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a machine is made of, beside its disks.

    Attributes
    ----------
    memory_bytes : int
        Its RAM, a whole number of MiB.
    cpus : int
        How many virtual CPUs it has.
    kernel, initrd : str, optional
        Absolute paths. Without a kernel, the first disk's boot loader starts.
    append : str
        The command line of that kernel.
    network : str
        "none", or "user": a network card behind the host's address (QEMU's user network).
    is_isolated : bool, optional
        Whether its network, and those of `qemu_args`, reach nothing. Without it, those of forks do not reach anything.
    agent : bool
        Whether the machine has a port for the guest agent.
    qemu_args : tuple of str
        Further arguments for the hypervisor, as its user gives them.
    program : str
        The hypervisor's program: a name that is looked up in PATH, or an absolute path.
    machine_type : str, optional
        The type, such as "pc-i440fx-7.2"; without it, the newest that the program has.
    cpu_model : str
        The model of its CPUs.
    hypervisor : str
        Which hypervisor runs it: "qemu".
    """

    memory_bytes: int
    cpus: int = 1
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    network: str = "none"
    is_isolated: bool | None = None
    agent: bool = True
    qemu_args: tuple[str, ...] = ()
    program: str = "qemu-system-x86_64"
    machine_type: str | None = None
    cpu_model: str = "max"
    hypervisor: str = "qemu"

    def __post_init__(self) -> None:
        if fault := _fault_of(self):
            raise ValueError(f"a machine cannot have {fault}")

    def to_json(self) -> str:
        """Return it as text, for `from_json`.

        Returns
        -------
        str
            JSON, on one line.
        """
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Parameters
        ----------
        text : str
            What `to_json` returned.

        Returns
        -------
        MachineConfiguration

        Raises
        ------
        FormatError
            It is something else, or has what this onionskin does not know.
        """
        return cls(**_from_json(cls, text, "the configuration of a machine", tuples=("qemu_args",)))


MachineConfiguration = Configuration  # its name where there are other configurations: `onionskin.MachineConfiguration`


@dataclass(frozen=True, slots=True)
class Recorded:
    """What must be the same where a snapshot of a machine is to run.

    Attributes
    ----------
    hypervisor, version : str
        Such as "qemu" and "7.2.22".
    machine_type : str
        The versioned type of the machine.
    accelerator, cpu_model : str
        Such as "tcg" and "max"; where the model is that of the host, with its name.
    memory_bytes, cpus : int
        As configured.
    devices : tuple of str
        The devices in order, without what may differ (the medium behind a disk, addresses, identity).
    guest_kernel : str
        The release of the Linux that the guest booted, such as "6.12.95-cloud-amd64"; empty where a disk's boot loader chose
        it. It may differ.
    is_frozen : bool
        Whether the guest's file systems were frozen at that instant: whoever lets it go on from there thaws them.
    state_crc32 : str
        Of the state of its devices, in hexadecimal; empty where an older onionskin took it, or it has none.
    """

    hypervisor: str
    version: str
    machine_type: str
    accelerator: str
    cpu_model: str
    memory_bytes: int
    cpus: int
    devices: tuple[str, ...] = ()
    guest_kernel: str = ""
    is_frozen: bool = False
    state_crc32: str = ""

    def to_json(self) -> str:
        """Return it as text, for `from_json`."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raise FormatError if it is something else."""
        return cls(**_from_json(cls, text, "the record of what a machine ran on", tuples=("devices",)))


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one machine from another that was made from the same snapshot.

    Attributes
    ----------
    generation : str
        The VM generation id, a UUID. A guest that sees another one draws new randomness.
    mac_seed : str
        From which the addresses of network cards are made. A guest that goes on keeps the address that it has.
    """

    generation: str = field(default_factory=lambda: str(uuid.uuid4()))
    mac_seed: str = ""

    def mac(self, number: int) -> str:
        """Return the address of a network card, of the range that QEMU uses."""
        import hashlib  # it loads OpenSSL, which only a start needs

        drawn = hashlib.sha256(f"{self.mac_seed or self.generation}/{number}".encode()).digest()
        return "52:54:00:" + ":".join(f"{byte:02x}" for byte in drawn[:3])


def compare(recorded: Recorded, now: Recorded) -> None:
    """Refuse to load what was recorded on another hypervisor, machine type, CPU or set of devices.

    Releases that differ in their last number (7.2.17 and 7.2.22) have the same form of state.

    Raises
    ------
    StateError
        It names what differs.
    """
    different = [what for what in (_difference(recorded, now, name) for name in _SAID) if what]
    if recorded.devices != now.devices:
        different.append(_difference_of_devices(recorded.devices, now.devices))
    if different:
        raise StateError(
            f"the snapshot cannot run on this machine's configuration here: {'; '.join(different)}. Use what it was "
            "taken with, or start the machine from its disks alone"
        )


_SAID = {
    "hypervisor": "hypervisor",
    "version": "version of the hypervisor",
    "machine_type": "machine type",
    "accelerator": "accelerator",
    "cpu_model": "CPU model",
    "memory_bytes": "RAM",
    "cpus": "number of CPUs",
}


def _difference(recorded: Recorded, now: Recorded, name: str) -> str:
    before, after = getattr(recorded, name), getattr(now, name)
    if before == after or (name == "version" and _release(before) == _release(after)):
        return ""
    if name == "memory_bytes":
        before, after = (f"{number >> 20} MiB" for number in (before, after))
    return f"its {_SAID[name]} was {before}, and would be {after}"


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _difference_of_devices(before: tuple[str, ...], after: tuple[str, ...]) -> str:
    gone, new = [one for one in before if one not in after], [one for one in after if one not in before]
    said = [f"without {', '.join(gone)}"] if gone else []
    said += [f"with {', '.join(new)}"] if new else []
    return "its devices would be " + (" and ".join(said) or "in another order")


class Process(Protocol):
    """A machine that a hypervisor runs. It is used by one thread at a time, save for `monitor` and `wait`.

    Attributes
    ----------
    pid : int
        The hypervisor's process.
    monitor : Monitor
        The connection to it. Every command has a time limit.
    ram_file : Path
        The file that its RAM is mapped over.
    guest_ram : GuestRam or None
        What it wrote to its RAM, noted from before its first instruction and before any state was loaded. None where that
        cannot be noted here: then its RAM is `ram_file`, shared, and a copy of its own.
    """

    pid: int
    monitor: "Monitor"
    ram_file: "Path"
    guest_ram: "GuestRam | None"

    def ram(self) -> "Preload | None":
        """Return the connection to the library in the process that has its RAM, or None without tracking."""

    def pause(self, *, runs: bool = False) -> bool:
        """Stop the machine. Return whether it ran. It is not asked whether it `runs` where that is known."""

    def watch(self, *, stands: bool) -> "Standstill":
        """Note from now on whether it goes on, or is reset, while it stands still: it does now, or is stopped next."""

    def resume(self) -> None:
        """Let it go on."""

    def wake(self, before: Callable[[], object] = lambda: None) -> bool:
        """Wake a guest that sleeps (S3): its machine is not stopped, and may not let itself be stopped.

        `before` is called first where it sleeps, and keeps it asleep where that raises. Return whether the machine runs then.
        """

    @property
    def is_paused(self) -> bool:
        """Whether it is stopped now. One whose guest sleeps is not: it wakes when its clock says so."""

    def hear_all(self) -> None:
        """Hear all that was reported of it until now, for `watch`."""

    @property
    def guest_has_ended(self) -> bool:
        """Whether it is stopped because its guest has shut down, or died, and the process stays all the same."""

    @property
    def has_stopped_itself(self) -> bool:
        """Whether it is stopped for that, or for an error of a disk: for what happened in it, and not by anybody."""

    def plugged(self) -> list[str]:
        """Return the devices that it has now, apart from those that are part of every machine of its type."""

    def disk_bytes(self) -> list[int]:
        """Return how large its disks are for the guest, in their order: as they were when it was started."""

    def prepare_state(self, path: "Path") -> None:
        """Make the file for the state of its devices, and do all that can be done before it is stopped."""

    def save_state(self, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
        """Write the state of its devices into the prepared file, while it is stopped. Return the devices, as `plugged`.

        `meanwhile` is called while that is written. On return all is heard that was reported until both had ended: see
        `hear_all`.
        """

    def finish_state(self) -> None:
        """Let go of the prepared file. Further calls do nothing."""

    def load_state(self, path: "Path") -> None:
        """Load the state of its devices, while it is stopped and its RAM is as it was then."""

    def loading(self, path: "Path") -> AbstractContextManager[Callable[[], None]]:
        """Prepare that, while it may run, and give what does it, as `load_state`."""

    def freeze(self) -> list[str]:
        """Have the guest's file systems frozen by its agent. Return what was frozen, in words.

        Raises
        ------
        StateError
            No agent answers.
        """

    def thaw(self) -> None:
        """Have them thawed."""

    def power_down(self) -> None:
        """Ask the guest to shut down (ACPI)."""

    def quit(self, seconds: float) -> None:
        """End the process, within so many seconds; killed, if it does not end by itself."""

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of the process. Return its exit status, or None where it still runs."""


class Hypervisor(Protocol):
    """What runs machines."""

    def check(self, configuration: Configuration, disks: int) -> Recorded:
        """Return what would run here. No process stays.

        Raises
        ------
        StateError
            The hypervisor is not installed, or cannot run this.
        """

    def launch(
        self,
        configuration: Configuration,
        *,
        name: str,
        directory: "Path",
        ram_file: "Path | None",
        disks: Sequence[str],
        state: "Path | None",
        identity: Identity,
        beside_its_start: Callable[[], None] = lambda: None,
    ) -> Process:
        """Start a machine that is stopped before its first instruction.

        Parameters
        ----------
        configuration : Configuration
        name : str
            What it is called in errors.
        directory : Path
            Of this machine alone, for sockets and logs.
        ram_file : Path, optional
            What its RAM holds at first; it is never written to. Without it, RAM is zero.
        disks : sequence of str
            NBD URIs, in the order of the disks.
        state : Path, optional
            State of its devices to load, which is there once `beside_its_start` has returned; `ram_file` is then the RAM of
            the same snapshot.
        identity : Identity
        beside_its_start : callable
            Is called when the process was started, which takes its time, and maybe more than once. It returns when the disks
            can be read, whose server listens already.
        """


# ---- JSON and checks ----


def _to_json(value: Any) -> str:
    return json.dumps(asdict(value), separators=(",", ":"), sort_keys=True)


def _from_json(kind: Any, text: str, what: str, *, tuples: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
        known = {one.name for one in fields(kind)}
        if unknown := sorted(set(value) - known):
            raise FormatError(f"{what} has {', '.join(unknown)}, which this onionskin does not know; use a newer one")
        for name in tuples:
            if name in value:
                value[name] = tuple(value[name])
        made = kind(**value)
        for one in fields(kind):
            _check_type(one.name, getattr(made, one.name), one.type)
        return dict(value)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{what} cannot be read: {error}") from None


def _check_type(name: str, value: object, wanted: object) -> None:
    kinds: dict[object, tuple[type, ...]] = {
        int: (int,),
        str: (str,),
        bool: (bool,),
        bool | None: (bool, type(None)),
        str | None: (str, type(None)),
        tuple[str, ...]: (tuple,),
    }
    if type(value) not in kinds[wanted] or (isinstance(value, tuple) and not all(type(one) is str for one in value)):
        raise TypeError(f"{name} is {value!r}")


def _fault_of(one: Configuration) -> str:
    """Return what a machine cannot have, or nothing."""
    if one.memory_bytes % MEMORY_UNIT or not MEMORY_BYTES_MIN <= one.memory_bytes <= MEMORY_BYTES_MAX:
        return f"{one.memory_bytes} bytes of RAM: it is a whole number of MiB, at least 1 and at most 4 TiB"
    if not 1 <= one.cpus <= CPUS_MAX:
        return f"{one.cpus} CPUs: it has 1 to {CPUS_MAX}"
    if one.kernel is None and (one.initrd is not None or one.append):
        return "an initrd or a command line of a kernel without a kernel; give kernel= too"
    for path in (one.kernel, one.initrd):
        if path is not None and not path.startswith("/"):
            return f"the file {path!r}: give an absolute path"
    if one.network not in NETWORKS:
        return f"the network {one.network!r}: it is one of {', '.join(NETWORKS)}"
    if one.hypervisor != "qemu":
        return f"the hypervisor {one.hypervisor!r}: it is qemu"
    texts = [one.append, one.program, one.cpu_model, one.machine_type or "", *one.qemu_args]
    if any("\0" in text or "\n" in text for text in texts):
        return "a zero byte or a new line in its configuration"
    if "," in (one.machine_type or ""):
        return f"the machine type {one.machine_type!r}: options of it go into qemu_args"
    return ""
