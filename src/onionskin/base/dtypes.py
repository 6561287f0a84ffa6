"""The types of the structured arrays that the package hands out and takes. Importing this imports NumPy."""

import numpy

EXTENT = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1")])
# As onion_extent_row in csrc/base/extents.h.
EXTENT_ROW = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("place", "<u8"), ("source", "<u4"), ("state", "<u4")])
# As `Layering` gives it, and the same rows by the names of `Extents`.
LAYER_EXTENT = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1"), ("depth", "<u4")])
LAYER_EXTENT_ROW = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1"), ("source", "<u4")])
SLOTS = numpy.dtype([("slot", "<u8"), ("count", "<u8")])
# As onion_run in csrc/index/blockmap.h, onion_layer_run in csrc/layer/layer_map.h, and the records of docs/format.md.
LOCATION_RUN = numpy.dtype([("block_index", "<u8"), ("block_count", "<u8"), ("location", "<u8")])
LAYER_RUN = numpy.dtype(
    {
        "names": ["block_index", "block_count", "state", "segment", "slot"],
        "formats": ["<u8", "<u8", "u1", "<u2", "<u4"],
        "offsets": [0, 8, 16, 18, 20],
        "itemsize": 24,
    }
)
# As onion_page_run in csrc/machine/tracking.h.
PAGE_RUN = numpy.dtype([("start", "<u8"), ("end", "<u8")])
RECORD = numpy.dtype(
    [
        ("block_index", "<u8"),
        ("block_count", "<u4"),
        ("slot", "<u4"),
        ("kind", "<u2"),
        ("segment", "<u2"),
        ("reserved", "<u4"),
    ]
)
