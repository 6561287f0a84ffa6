/* layer_map.h: the block map of one layer, made from the bytes of its map log and written back as a compact log.
 *
 * The functions work on memory only and do no I/O. They are for one thread at a time: no other thread may look at a
 * map while one of them changes it (so the maps have retire == NULL). If a function returns -ENOMEM, the map is
 * half changed, and only onion_layer_destroy may be called on it. */
#ifndef ONIONSKIN_LAYER_LAYER_MAP_H
#define ONIONSKIN_LAYER_LAYER_MAP_H

#include "index/blockmap.h"
#include "layer/map_log.h"

struct onion_layer {
    struct onion_map map; /* segment numbers are those of segment_ids: 1 for the first */
    uint32_t block_shift;
    uint32_t segment_count;
    uint32_t segment_capacity;
    unsigned char (*segment_ids)[ONION_UUID_BYTES];
    int has_size;        /* a SIZE record was read */
    uint64_t size_bytes; /* of the last one */
};

/* An empty layer of block_count blocks. -ENOMEM, -EINVAL. */
int onion_layer_init(struct onion_layer *layer, uint64_t block_count, uint32_t block_shift);
/* Frees everything; also good on a zeroed or already destroyed layer. */
void onion_layer_destroy(struct onion_layer *layer);
/* Makes room for at least block_count blocks; never fewer than there are. -ENOMEM. */
int onion_layer_grow(struct onion_layer *layer, uint64_t block_count);

/* Gives a segment the next number. The caller sees to it that it has none yet. Returns the
 * number, or ONION_E_FORMAT where none is left, or -ENOMEM. */
int onion_layer_add_segment(struct onion_layer *layer, const unsigned char uuid[ONION_UUID_BYTES]);

/* Applies the frames of a log, from cursor->offset on to the end of its `length` bytes, to an empty layer. The layer
 * grows with SIZE records; segments get numbers in the order of their first SEGMENT record, whatever numbers the log
 * gives them. Returns 0 at a clean end, or a code of onion_log_next (ONION_E_TORN: all whole frames are applied), or
 * ONION_E_FORMAT for an unsound record, or -ENOMEM. *fault_offset is the byte of the bad frame or record. */
int onion_layer_load(struct onion_layer *layer, const unsigned char *bytes, uint64_t length,
                     struct onion_log_cursor *cursor, uint64_t *fault_offset);

/* Where the writing of a compact log stands. Zeroed to begin. */
struct onion_layer_writer {
    uint64_t block_index; /* what lies before it has been given out */
    uint32_t numbers_given;
    uint16_t number_of[ONION_SEGMENT_LAST + 1]; /* by number in the layer: number in the new log, 0 none yet */
};
/* The next records, at most `capacity` (2 or more): a SEGMENT record right before the first DATA record that needs it.
 * Returns how many; 0 at the end. */
uint32_t onion_layer_records(const struct onion_layer *layer, struct onion_layer_writer *writer,
                             struct onion_record *records, uint32_t capacity);

/* A run as Python sees it. */
struct onion_layer_run {
    uint64_t block_index;
    uint64_t block_count;
    uint8_t state; /* 1 DATA, 2 ZERO */
    uint8_t unused;
    uint16_t segment;
    uint32_t slot;
};
/* Blocks or slots: `count` of them from `first` on. */
struct onion_stretch {
    uint64_t first;
    uint64_t count;
};

/* These two return how many entries there are and write them to `out`, unless that is NULL. */
uint64_t onion_layer_runs(const struct onion_layer *layer, struct onion_layer_run *out);
uint64_t onion_layer_slots(const struct onion_layer *layer, uint32_t segment, struct onion_stretch *out);
/* Sorts stretches and joins those that meet or overlap, in place. Returns how many are left. */
uint64_t onion_stretches_join(struct onion_stretch *stretches, uint64_t count);

/* Finds the runs of bits that are set. Returns how many there are and writes them to `out`, unless that is NULL. */
uint64_t onion_stretches_of_bits(const unsigned char *bitmap, uint64_t bits, struct onion_stretch *out);
/* Gathers the slots of all segments in one pass: those of number n are out[starts[n]] up to out[starts[n + 1]], in the
 * order of the blocks. `starts` has segment_count + 2 entries. If `out` is NULL, this fills `starts` alone. */
void onion_layer_slots_by_segment(const struct onion_layer *layer, uint64_t *starts, struct onion_stretch *out);

void onion_layer_count(const struct onion_layer *layer, uint64_t *data_blocks, uint64_t *zero_blocks);
/* For each segment number n: blocks[n] are in it, and ends[n] is one more than the highest slot of them (0: none). Both
 * have segment_count + 1 entries, which are zero. */
void onion_layer_segment_use(const struct onion_layer *layer, uint64_t *blocks, uint64_t *ends);
/* ZERO becomes HOLE. -ENOMEM. */
int onion_layer_drop_zero(struct onion_layer *layer);
/* Blocks in slot slots[i].first + k of `segment` move to slot new_first[i] + k of new_segment. slots is sorted and
 * without overlaps; blocks in other slots stay. Returns the number of blocks moved, or -ENOMEM. */
int64_t onion_layer_replace(struct onion_layer *layer, uint32_t segment, const struct onion_stretch *slots,
                            const uint64_t *new_first, uint64_t count, uint32_t new_segment);

#endif
