"""What can go wrong, by kind.

``OSError`` (with errno and file name) is for what the system refuses; the classes here are for what only onionskin
can say. Every message says what happened, to which file or name, and what to do. The command line maps each class to
an exit status (see ``onionskin.cli``).
"""


class OnionskinError(Exception):
    """The root of all errors that onionskin itself raises."""


class FormatError(OnionskinError):
    """A file is damaged, or of a version or with a feature that this onionskin does not know."""


class StateError(OnionskinError):
    """The operation is right but not now: closed, busy, held by another process, poisoned, still in use."""


class ChainError(OnionskinError):
    """Layers or a base do not fit together: a base that changed, snapshots without a common ancestor."""


class VolumeNotFoundError(OnionskinError, LookupError):
    """The store has no volume of that name."""


class VolumeExistsError(OnionskinError):
    """The store already has a volume of that name."""


class SnapshotNotFoundError(OnionskinError, LookupError):
    """The volume, or the machine, has no snapshot of that name."""


class SnapshotExistsError(OnionskinError):
    """The volume, or the machine, already has a snapshot of that name."""


class MachineNotFoundError(OnionskinError, LookupError):
    """The store has no machine of that name."""


class MachineExistsError(OnionskinError):
    """The store already has a machine of that name."""


class VerifyError(OnionskinError):
    """Bytes read back are not the bytes that were written, or a digest does not match."""


def moved_error(what: object) -> StateError:
    """Make the error of a store that was moved while it was open. A copy in its place has files of the same names."""
    return StateError(
        f"{what}: the store is not where it was opened: it was moved, or another one was put in its place; put it back, "
        "or end what has it open"
    )
