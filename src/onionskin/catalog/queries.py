"""The catalog as all other packages see it: one connection, and all queries that have names."""

from onionskin.catalog.defaults import StoreDefaults
from onionskin.catalog.layers import Layers
from onionskin.catalog.lineage import Lineage
from onionskin.catalog.machines import Machines
from onionskin.catalog.progress import ProgressOfStore
from onionskin.catalog.references import References
from onionskin.catalog.segments import Segments
from onionskin.catalog.snapshots import Snapshots
from onionskin.catalog.volumes import Volumes
from onionskin.catalog.work import Work


class Catalog(
    Volumes, Snapshots, Layers, Segments, Lineage, Machines, Work, StoreDefaults, References, ProgressOfStore
):
    """One connection to a store's catalog, with the queries of each subject. Any thread may call the methods."""
