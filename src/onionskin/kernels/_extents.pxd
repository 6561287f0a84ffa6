"""What other extension modules need to make tables of extents: `_volume` of an index, `_maplog` of the map of a layer."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "base/extents.h" nogil:
    enum:
        ONION_EXTENT_STATE_HOLE
        ONION_EXTENT_STATE_DATA
        ONION_EXTENT_STATE_ZERO
    const uint64_t ONION_EXTENTS_END
    struct onion_extent_row:
        uint64_t offset
        uint64_t length
        uint64_t place
        uint32_t source
        uint32_t state
    struct onion_extents:
        onion_extent_row *rows
        size_t count
    void onion_extents_destroy(onion_extents *extents)
    int onion_extents_add(onion_extents *extents, const onion_extent_row *row)
    int onion_extents_over(const onion_extents *upper, const onion_extents *lower, onion_extents *out)
    int onion_extents_within(const onion_extents *extents, const onion_extents *within, onion_extents *out)
    void onion_extents_join(onion_extents *extents)
    void onion_extents_pack(onion_extents *extents, uint64_t offset, uint64_t unit)
    uint64_t onion_extents_bytes_before(const onion_extents *extents, uint64_t offset)
    uint64_t onion_extents_offset_after(const onion_extents *extents, uint64_t bytes)


cdef class Extents:
    cdef onion_extents table  # it is filled by who makes the object, and does not change afterwards
