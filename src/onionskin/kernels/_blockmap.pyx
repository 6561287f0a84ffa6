"""The block map kernel (csrc/index/blockmap.h) as a Python class, for tests and tools."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

import os

from onionskin.errors import StateError
from onionskin.base.lazy import dtypes
from onionskin.base.lazy import numpy as np

cdef extern from "index/blockmap.h" nogil:
    ctypedef uint64_t onion_location
    const onion_location ONION_LOCATION_HOLE
    const onion_location ONION_LOCATION_ZERO
    const uint32_t ONION_SLOT_LAST
    struct onion_run:
        uint64_t block_index
        uint64_t block_count
        onion_location location
    struct onion_map:
        uint64_t block_count
    bint onion_location_is_data(onion_location location)
    uint32_t onion_location_slot(onion_location location)
    int onion_map_init(onion_map *map, uint64_t block_count, uint32_t block_shift)
    void onion_map_destroy(onion_map *map)
    int onion_map_resize(onion_map *map, uint64_t block_count)
    uint64_t onion_map_memory(const onion_map *map)
    onion_location onion_map_lookup(const onion_map *map, uint64_t block_index)
    void onion_map_run_at(const onion_map *map, uint64_t block_index, uint64_t block_limit, onion_run *run)
    int onion_map_next(const onion_map *map, uint64_t block_index, uint64_t block_end, onion_run *run)
    void onion_map_lookup_many(const onion_map *map, const uint64_t *block_indices, size_t count,
                               onion_location *locations)
    int onion_map_set(onion_map *map, uint64_t block_index, uint64_t block_count, onion_location location)
    int onion_map_fold(onion_map *lower, const onion_map *upper, const uint16_t *renumber)
    uint64_t onion_map_count_shadowed(const onion_map *lower, const onion_map *upper)

cdef extern from "index/bulk_build.h" nogil:
    struct onion_build:
        uint64_t *slots_end
    int onion_build_init(onion_build *, onion_map *)
    int onion_build_put(onion_build *, uint64_t, uint64_t, onion_location)
    int onion_build_apply(onion_build *)
    void onion_build_destroy(onion_build *)


HOLE = int(ONION_LOCATION_HOLE)
ZERO = int(ONION_LOCATION_ZERO)
SEGMENT_NUMBERS = 1 << 16


cdef int check(int status) except -1:
    if status < 0:
        raise OSError(-status, f"the index cannot be changed: {os.strerror(-status)}")
    return status


cdef class BlockMap:
    """The index of one volume or layer: block -> location.

    A location is an int: ``HOLE``, ``ZERO``, or ``segment << 32 | slot`` with segment 1 to 0xFFFE. Only one thread at a
    time may use a map, because leaves are changed in place.

    Parameters
    ----------
    block_count : int
        The number of blocks of the disk.
    block_shift : int
        The binary logarithm of the block size in bytes, 12 to 21.

    Raises
    ------
    OSError
        EINVAL if the disk would pass 2**63 bytes or the block size is not possible, or ENOMEM.
    """

    cdef onion_map map
    cdef bint is_open

    def __cinit__(self, uint64_t block_count, uint32_t block_shift=12):
        check(onion_map_init(&self.map, block_count, block_shift))
        self.is_open = True

    def __dealloc__(self):
        onion_map_destroy(&self.map)

    cdef int check_open(self) except -1:
        if not self.is_open:
            raise StateError("the block map is closed: make a new one")
        return 0

    cdef int check_range(self, uint64_t block_index, uint64_t block_count) except -1:
        self.check_open()
        if block_index > self.map.block_count or block_count > self.map.block_count - block_index:
            raise ValueError(
                f"blocks {block_index} to {block_index + block_count} pass the end of the map at"
                f" {self.map.block_count}"
            )
        return 0

    def close(self):
        """Free the map. Further calls do nothing."""
        self.is_open = False
        onion_map_destroy(&self.map)

    def __len__(self):
        self.check_open()
        return self.map.block_count

    def lookup(self, uint64_t block_index):
        """Return the location of one block."""
        self.check_range(block_index, 1)
        return onion_map_lookup(&self.map, block_index)

    def run_at(self, uint64_t block_index, uint64_t block_limit):
        """Return the run at a block, at most `block_limit` blocks long, as (block_index, block_count, location)."""
        cdef onion_run run
        self.check_range(block_index, 1)
        if block_limit == 0:
            raise ValueError("block_limit is 0: ask for one block at least")
        onion_map_run_at(&self.map, block_index, block_limit, &run)
        return run.block_index, run.block_count, run.location

    def next(self, uint64_t block_index, uint64_t block_end):
        """Return the first run that is not HOLE at or after `block_index`, before `block_end`, or None."""
        cdef onion_run run
        cdef int found
        self.check_open()
        with nogil:
            found = onion_map_next(&self.map, block_index, block_end, &run)
        return (run.block_index, run.block_count, run.location) if found else None

    def runs(self):
        """Return all runs that are not HOLE, as an ndarray of dtypes.LOCATION_RUN in block order."""
        cdef onion_run run
        self.check_open()
        found = []
        run.block_index = run.block_count = 0
        while onion_map_next(&self.map, run.block_index + run.block_count, self.map.block_count, &run):
            found.append((run.block_index, run.block_count, run.location))
        return np.array(found, dtype=dtypes.LOCATION_RUN)

    def lookup_many(self, block_indices):
        """Return the locations of many blocks, in their order, as an ndarray of uint64."""
        self.check_open()
        cdef const uint64_t[::1] indices = np.ascontiguousarray(block_indices, dtype=np.uint64)
        locations = np.empty(indices.shape[0], dtype=np.uint64)
        cdef uint64_t[::1] out = locations
        cdef size_t count = indices.shape[0]
        if count == 0:
            return locations
        if np.max(indices) >= self.map.block_count:
            raise ValueError(f"block {np.max(indices)} is past the end of the map at {self.map.block_count}")
        with nogil:
            onion_map_lookup_many(&self.map, &indices[0], count, &out[0])
        return locations

    def set(self, uint64_t block_index, uint64_t block_count, uint64_t location):
        """Map blocks to `location` or, for DATA, to this slot and the slots that follow it. HOLE unmaps the blocks."""
        cdef int status
        self.check_range(block_index, block_count)
        if onion_location_is_data(location):
            if block_count and onion_location_slot(location) + (block_count - 1) > ONION_SLOT_LAST:
                raise ValueError(f"{block_count} blocks from slot {onion_location_slot(location)} pass the last slot")
        elif location != ONION_LOCATION_HOLE and location != ONION_LOCATION_ZERO:
            raise ValueError(f"{location:#x} is not a location: neither HOLE nor ZERO nor in segments 1 to 0xFFFE")
        with nogil:
            status = onion_map_set(&self.map, block_index, block_count, location)
        check(status)

    def set_many(self, changes):
        """Make many changes at once, as the opening of a volume does.

        Parameters
        ----------
        changes : sequence of (block_index, block_count, location)
            Later changes replace earlier ones. Blocks past the end of the map are left out.

        Returns
        -------
        dict of int to int
            For each segment that a changed range names, one more than the highest slot that is named.
        """
        cdef onion_build build
        cdef int status
        self.check_open()
        check(onion_build_init(&build, &self.map))
        try:
            for block_index, block_count, location in changes:
                check(onion_build_put(&build, block_index, block_count, location))
            with nogil:
                status = onion_build_apply(&build)
            check(status)
            return {number: build.slots_end[number] for number in range(1, 0xFFFF) if build.slots_end[number]}
        finally:
            onion_build_destroy(&build)

    def fold(self, BlockMap upper not None, renumber=None):
        """Lay `upper` over this map.

        Parameters
        ----------
        upper : BlockMap
            Its blocks that are not HOLE replace those of this map. Blocks past the end of this map are left out.
        renumber : array_like of uint16, shape (65536,), optional
            The new number of each segment of `upper`.
        """
        cdef const uint16_t[::1] numbers
        cdef const uint16_t *first = NULL
        cdef int status
        self.check_open()
        upper.check_open()
        if renumber is not None:
            numbers = np.ascontiguousarray(renumber, dtype=np.uint16)
            if numbers.shape[0] != SEGMENT_NUMBERS:
                raise ValueError(f"renumber has {numbers.shape[0]} numbers: it must have {SEGMENT_NUMBERS}")
            first = &numbers[0]
        with nogil:
            status = onion_map_fold(&self.map, &upper.map, first)
        check(status)

    def count_shadowed(self, BlockMap upper not None):
        """Return how many blocks are DATA here and not HOLE in `upper`."""
        cdef uint64_t shadowed
        self.check_open()
        upper.check_open()
        with nogil:
            shadowed = onion_map_count_shadowed(&self.map, &upper.map)
        return shadowed

    def resize(self, uint64_t block_count):
        """Change the number of blocks. Blocks past the new end must be HOLE."""
        cdef onion_run run
        self.check_open()
        if onion_map_next(&self.map, block_count, self.map.block_count, &run):
            raise ValueError(f"block {run.block_index} is past the new end and mapped: set it to HOLE first")
        check(onion_map_resize(&self.map, block_count))

    @property
    def memory_bytes(self):
        """The number of bytes of memory that the map takes."""
        self.check_open()
        return onion_map_memory(&self.map)
