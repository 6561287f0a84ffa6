/* extents.h: tables of the extents of a disk, and how two of them lie over each other.
 *
 * The extents of a table are in order and do not overlap. There may be gaps between them. What makes a table (the maps of
 * layers, the holes of a file) knows what its sources are; here they are only numbers.
 *
 * The functions work on memory only, do no I/O, and are for one thread. Those that return int return 0 or -ENOMEM; then the
 * table that they make is incomplete, and only onion_extents_destroy may be called for it. A table that is made is empty
 * before (zeroed), and is not one of those that it is made of. */
#ifndef ONIONSKIN_BASE_EXTENTS_H
#define ONIONSKIN_BASE_EXTENTS_H

#include <stddef.h>
#include <stdint.h>

#define ONION_EXTENTS_END ((uint64_t)1 << 63) /* no extent reaches past it: sums of offset and length do not overflow */

enum { ONION_EXTENT_STATE_HOLE, ONION_EXTENT_STATE_DATA, ONION_EXTENT_STATE_ZERO };

struct onion_extent_row {
    uint64_t offset; /* of the disk, in bytes, as all that follows */
    uint64_t length; /* at least 1 */
    uint64_t place;  /* of DATA: where its first byte lies in its source; else 0 */
    uint32_t source; /* what the bytes come from */
    uint32_t state;
};

struct onion_extents {
    struct onion_extent_row *rows;
    size_t count;
    size_t room;
};

/* Frees everything; also good on a zeroed or already destroyed one. */
void onion_extents_destroy(struct onion_extents *extents);

/* Adds an extent at the end of a table. It does not begin before the end of the last one. */
int onion_extents_add(struct onion_extents *extents, const struct onion_extent_row *row);
/* Makes `out` what shows where `upper` lies over `lower`: all of upper, and in its gaps what lower has there. */
int onion_extents_over(const struct onion_extents *upper, const struct onion_extents *lower, struct onion_extents *out);
/* Makes `out` the parts of the extents that lie in the extents of `within`. */
int onion_extents_within(const struct onion_extents *extents, const struct onion_extents *within,
                         struct onion_extents *out);
/* Makes one extent of neighbours that are one: same state, same source, and DATA also goes on in its source. */
void onion_extents_join(struct onion_extents *extents);
/* Packs the extents behind each other: the first begins at `offset`, and each at a multiple of `unit` from there. */
void onion_extents_pack(struct onion_extents *extents, uint64_t offset, uint64_t unit);

/* How many bytes of the extents lie before an offset. */
uint64_t onion_extents_bytes_before(const struct onion_extents *extents, uint64_t offset);
/* The lowest offset before which `bytes` bytes of the extents lie. There are as many, and `bytes` is not 0. */
uint64_t onion_extents_offset_after(const struct onion_extents *extents, uint64_t bytes);

#endif
