"""A snapshot of a machine, as whoever took it is told of it. Importing this imports nothing that reads RAM."""

from typing import TYPE_CHECKING

from onionskin.base.records import record

if TYPE_CHECKING:
    from onionskin.base.annotations import RecordedMode


@record
class MachineSnapshot:
    """A snapshot of a machine that was taken.

    Attributes
    ----------
    name, note, mode : str
        As it is called; and how it was taken: "live", "pause", or "off".
    pause_seconds : float
        For how long the machine stood still; 0 where it did not run.
    bytes_stored : int
        What RAM and the state of the devices took in the store.
    disks : tuple of str
        The names of the disks in it.
    frozen : tuple of str
        What the guest's agent froze.
    """

    name: str
    note: str
    mode: "RecordedMode"
    pause_seconds: float = 0.0
    bytes_stored: int = 0
    disks: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
