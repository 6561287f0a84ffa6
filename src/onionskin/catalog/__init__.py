"""The catalog, which is the only source for names and for the owner of each file.

The module `connection` says what must hold. `volumes`, `snapshots`, `layers`, `segments`, `lineage`, `machines`,
`work` and `defaults` have a query for each question that other packages ask. No other package writes SQL itself.
"""

from onionskin.catalog.defaults import Defaults
from onionskin.catalog.queries import Catalog
from onionskin.catalog.rows import (
    BaseRow,
    ForkCallRow,
    HoldRow,
    LabelRow,
    LayerRow,
    LineageRow,
    MachineDiskRow,
    MachineRow,
    MachineSnapshotDiskRow,
    MachineSnapshotRow,
    Row,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    WorkRow,
    new_id,
    new_ids,
)
from onionskin.catalog.schema import SCHEMA_VERSION
from onionskin.catalog.sqlite_errors import CommitUnknownError

__all__ = [
    "SCHEMA_VERSION",
    "BaseRow",
    "Catalog",
    "CommitUnknownError",
    "Defaults",
    "ForkCallRow",
    "HoldRow",
    "LabelRow",
    "LayerRow",
    "LineageRow",
    "MachineDiskRow",
    "MachineRow",
    "MachineSnapshotDiskRow",
    "MachineSnapshotRow",
    "Row",
    "SegmentRow",
    "SnapshotRow",
    "VolumeRow",
    "WorkRow",
    "new_id",
    "new_ids",
]
