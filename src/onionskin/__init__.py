"""onionskin: a copy-on-write snapshot engine for virtual disks.

`Store` is the way in. Names are loaded when they are first used, so that importing the package costs little.
"""

# Not from typing, and no import above the names: a program that begins here can soon say what Ctrl-C does to it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from onionskin.base.sizes import format_size, parse_size
    from onionskin.catalog.defaults import Defaults
    from onionskin.catalog.tree import Snapshot
    from onionskin.control.client import LiveVolume, connect
    from onionskin.control.client import flush_served as flush_served
    from onionskin.control.groups import agrees_to_revert as agrees_to_revert
    from onionskin.control.groups import find_served_heads as find_served_heads
    from onionskin.control.groups import fork_served as fork_served
    from onionskin.control.groups import revert_machine_served as revert_machine_served
    from onionskin.control.groups import revert_served as revert_served
    from onionskin.control.groups import snapshot_group_served as snapshot_group_served
    from onionskin.control.groups import tidy_served as tidy_served
    from onionskin.errors import (
        ChainError,
        FormatError,
        MachineExistsError,
        MachineNotFoundError,
        OnionskinError,
        SnapshotExistsError,
        SnapshotNotFoundError,
        StateError,
        VerifyError,
        VolumeExistsError,
        VolumeNotFoundError,
    )
    from onionskin.machine.hypervisor import Configuration as MachineConfiguration
    from onionskin.machine.leftovers import drop_leftovers as drop_leftovers
    from onionskin.machine.leftovers import refuse_processes as refuse_processes
    from onionskin.machine.machine import Machine
    from onionskin.machine.pool import MachinePool
    from onionskin.machine.pool_leftovers import end_expired as end_expired
    from onionskin.machine.qemu_command import refuse_arguments as refuse_arguments
    from onionskin.machine.taken import MachineSnapshot
    from onionskin.operations.chain_members import ChainLayer, ChainMember
    from onionskin.operations.check import Problem
    from onionskin.operations.fork_usage import ForkUsage
    from onionskin.operations.holds import Hold
    from onionskin.operations.layering import Layering
    from onionskin.operations.lineage import Ancestor
    from onionskin.operations.listing import TreeNode, VolumeInfo
    from onionskin.operations.machine_tree import MachineSnapshotInfo
    from onionskin.operations.machine_usage import MachineUsage
    from onionskin.operations.machines import MachineDisk, MachineInfo
    from onionskin.operations.prune import Retention
    from onionskin.operations.store_info import StoreInfo
    from onionskin.operations.usage import Usage
    from onionskin.store import Store
    from onionskin.volume import Volume

__version__ = "0.1.0"  # the one place: pyproject.toml reads it from here

_HOME = {
    **dict.fromkeys(
        (
            "ChainError", "FormatError", "MachineExistsError", "MachineNotFoundError", "OnionskinError",
            "SnapshotExistsError", "SnapshotNotFoundError", "StateError", "VerifyError", "VolumeExistsError",
            "VolumeNotFoundError",
        ),
        "onionskin.errors",
    ),
    **dict.fromkeys(("format_size", "parse_size"), "onionskin.base.sizes"),
    **dict.fromkeys(("TreeNode", "VolumeInfo"), "onionskin.operations.listing"),
    **dict.fromkeys(("ChainLayer", "ChainMember"), "onionskin.operations.chain_members"),
    **dict.fromkeys(("LiveVolume", "connect"), "onionskin.control.client"),
    # By which a store reaches the processes that hold its volumes, whose code stands on its own.
    **dict.fromkeys(("drop_leftovers", "refuse_processes"), "onionskin.machine.leftovers"),
    "flush_served": "onionskin.control.client",
    **dict.fromkeys(
        (
            "agrees_to_revert", "find_served_heads", "fork_served", "revert_machine_served", "revert_served",
            "snapshot_group_served", "tidy_served",
        ),
        "onionskin.control.groups",
    ),
    "end_expired": "onionskin.machine.pool_leftovers",
    "refuse_arguments": "onionskin.machine.qemu_command",
    "Ancestor": "onionskin.operations.lineage",
    "Defaults": "onionskin.catalog.defaults",
    "ForkUsage": "onionskin.operations.fork_usage",
    "Hold": "onionskin.operations.holds",
    "Layering": "onionskin.operations.layering",
    "Machine": "onionskin.machine.machine",
    "MachineConfiguration": "onionskin.machine.hypervisor",
    "MachineDisk": "onionskin.operations.machines",
    "MachineInfo": "onionskin.operations.machines",
    "MachinePool": "onionskin.machine.pool",
    "MachineSnapshot": "onionskin.machine.taken",
    "MachineSnapshotInfo": "onionskin.operations.machine_tree",
    "MachineUsage": "onionskin.operations.machine_usage",
    "Problem": "onionskin.operations.check",
    "Retention": "onionskin.operations.prune",
    "Snapshot": "onionskin.catalog.tree",
    "Store": "onionskin.store",
    "StoreInfo": "onionskin.operations.store_info",
    "Usage": "onionskin.operations.usage",
    "Volume": "onionskin.volume",
}  # fmt: skip

__all__ = [
    "Ancestor",
    "ChainError",
    "ChainLayer",
    "ChainMember",
    "Defaults",
    "ForkUsage",
    "FormatError",
    "Hold",
    "Layering",
    "LiveVolume",
    "Machine",
    "MachineConfiguration",
    "MachineDisk",
    "MachineExistsError",
    "MachineInfo",
    "MachineNotFoundError",
    "MachinePool",
    "MachineSnapshot",
    "MachineSnapshotInfo",
    "MachineUsage",
    "OnionskinError",
    "Problem",
    "Retention",
    "Snapshot",
    "SnapshotExistsError",
    "SnapshotNotFoundError",
    "StateError",
    "Store",
    "StoreInfo",
    "TreeNode",
    "Usage",
    "VerifyError",
    "Volume",
    "VolumeExistsError",
    "VolumeInfo",
    "VolumeNotFoundError",
    "connect",
    "format_size",
    "parse_size",
]


def __dir__() -> list[str]:
    return sorted({*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"})


def __getattr__(name: str) -> "Any":
    if name not in _HOME:
        raise AttributeError(f"module 'onionskin' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
