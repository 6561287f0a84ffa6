/* blockmap.h: the index that says where each block of a volume is.
 *
 * A block maps to a location: a segment number (16 bits) and a slot (32 bits), or one of two states without data. A
 * run is a stretch of consecutive blocks that are all HOLE, all ZERO, or DATA in consecutive slots.
 *
 * The index has two levels. The root has one 8-byte entry for each 2 MiB of disk, which is either a whole-range run
 * or a leaf. A sparse leaf is a short sorted list of runs, 8 bytes each. A dense leaf is a table with one location for
 * each block. So a look-up is two or three memory loads, whatever the number of layers, and memory follows
 * fragmentation and not size. The root is anonymous mmap, so parts that were never written cost no memory.
 *
 * Threads: look-ups take no lock and may run beside writers. The caller must keep writers to one 2 MiB range apart
 * (onion_map_range_of says which range a block is in). A leaf that a writer replaces is handed to `retire`, which
 * must free it only when no look-up that began before can still be reading it. With retire == NULL no other thread
 * may use the map during a write; leaves are then changed in place, and building is faster. */
#ifndef ONIONSKIN_INDEX_BLOCKMAP_H
#define ONIONSKIN_INDEX_BLOCKMAP_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t onion_location;

#define ONION_LOCATION_HOLE ((onion_location)0)
#define ONION_LOCATION_ZERO ((onion_location)0xFFFF << 32)
#define ONION_SEGMENT_FIRST 1u
#define ONION_SEGMENT_LAST 0xFFFEu
#define ONION_SLOT_LAST 0xFFFFFFFEu

/* 2 MiB of disk for each root entry; a block is at least 4 KiB, so a leaf has at most 512 blocks. */
#define ONION_RANGE_BYTES_SHIFT 21
#define ONION_BLOCK_SHIFT_MIN 12
#define ONION_BLOCK_SHIFT_MAX 21

static inline onion_location onion_location_make(uint32_t segment, uint32_t slot) {
    return (onion_location)segment << 32 | slot;
}
static inline uint32_t onion_location_segment(onion_location location) { return (uint32_t)(location >> 32); }
static inline uint32_t onion_location_slot(onion_location location) { return (uint32_t)location; }
static inline int onion_location_is_data(onion_location location) {
    return onion_location_segment(location) - ONION_SEGMENT_FIRST <= ONION_SEGMENT_LAST - ONION_SEGMENT_FIRST;
}
/* Returns the location `blocks` blocks further into a run that begins at `location`. */
static inline onion_location onion_location_advance(onion_location location, uint64_t blocks) {
    return onion_location_is_data(location) ? location + blocks : location;
}

struct onion_run {
    uint64_t block_index;
    uint64_t block_count;
    onion_location location; /* the first block's location; a DATA run continues in the slots that follow */
};

/* Takes over a leaf, and calls free() on it later. */
typedef void (*onion_retire_fn)(void *context, void *leaf);

struct onion_map {
    uint64_t *root; /* root_count entries, see blockmap.c */
    uint64_t root_count;
    size_t root_bytes; /* length of the mapping behind root */
    uint64_t *touched; /* a bit for each 512 entries of the root, see blockmap.c */
    uint64_t block_count;
    uint32_t range_shift;   /* log2 of the blocks under one root entry: 0 to 9 */
    int64_t leaf_bytes;     /* memory held by leaves, kept with atomics */
    onion_retire_fn retire; /* NULL: no thread reads during writes */
    void *retire_context;
};

/* Makes an empty map (all HOLE) of block_count blocks of 1 << block_shift bytes. -ENOMEM, -EINVAL. */
int onion_map_init(struct onion_map *map, uint64_t block_count, uint32_t block_shift);
/* Frees everything. The map may also be zeroed or destroyed already. */
void onion_map_destroy(struct onion_map *map);
/* Changes the number of blocks. Those past the new end must be HOLE. No other thread may use the map. -ENOMEM, or
 * -EINVAL if the disk would pass 2^63 bytes; then nothing has changed. */
int onion_map_resize(struct onion_map *map, uint64_t block_count);
/* The old root of a map that has grown, while readers may still use it. */
struct onion_old_root {
    uint64_t *root, *touched;
    size_t root_bytes;
};
/* Makes room for block_count blocks, rounded up to whole ranges. The map never becomes smaller. Other threads may read
 * during the call, but not write. The caller frees *old when the earlier readers have left. -ENOMEM, -EINVAL: nothing
 * has changed. */
int onion_map_grow(struct onion_map *map, uint64_t block_count, struct onion_old_root **old);
void onion_old_root_free(struct onion_old_root *old);
/* Returns the bytes of memory of the map: its leaves (without those that were given to retire), and the pages of the
 * root that were touched. */
uint64_t onion_map_memory(const struct onion_map *map);

static inline uint64_t onion_map_range_of(const struct onion_map *map, uint64_t block_index) {
    return block_index >> map->range_shift;
}

/* Returns the location of one block. block_index < block_count. */
onion_location onion_map_lookup(const struct onion_map *map, uint64_t block_index);
/* Finds the run at block_index, of at most block_limit blocks. It does not look beyond one range or one packed run, so
 * the run of the next call may continue this one. */
void onion_map_run_at(const struct onion_map *map, uint64_t block_index, uint64_t block_limit, struct onion_run *run);
/* Finds the next run that is not HOLE at or after block_index and before block_end. Runs that continue each other
 * across ranges are joined. Returns 1, or 0 if there is none. */
int onion_map_next(const struct onion_map *map, uint64_t block_index, uint64_t block_end, struct onion_run *run);
/* Sets locations[i] to the location of block_indices[i]. Every index must be below block_count. */
void onion_map_lookup_many(const struct onion_map *map, const uint64_t *block_indices, size_t count,
                           onion_location *locations);
/* Maps block_count blocks from block_index on to `location` and, for DATA, the slots that follow. HOLE unmaps. After
 * -ENOMEM, the ranges (2 MiB each) before the one that failed are changed and the others are not. */
int onion_map_set(struct onion_map *map, uint64_t block_index, uint64_t block_count, onion_location location);
/* Lays upper over lower: blocks that are not HOLE in upper replace those of lower. Segment numbers of upper become
 * renumber[number]; if renumber is NULL, they are kept. Blocks of upper past the end of lower are left out. -ENOMEM. */
int onion_map_fold(struct onion_map *lower, const struct onion_map *upper, const uint16_t *renumber);
/* A change to blocks of one range. */
struct onion_change {
    uint64_t where; /* onion_change_where */
    onion_location location;
};
#define ONION_CHANGE_RANGE_SHIFT 20
static inline uint64_t onion_change_where(uint64_t range, uint32_t block, uint32_t block_count) {
    return range << ONION_CHANGE_RANGE_SHIFT | block << 10 | block_count;
}
/* Makes many changes, and writes each leaf only once. The changes are sorted by range and lie inside the map. Within a
 * range, later changes replace earlier ones. No thread may read meanwhile (retire == NULL). slots_end[segment] is
 * raised to the end of the highest slot that a changed range names now. -ENOMEM: the ranges before the one that failed
 * are changed. */
int onion_map_apply(struct onion_map *map, const struct onion_change *changes, size_t count, uint64_t *slots_end);

/* Returns the first range from `range` on in which some block is not HOLE, or UINT64_MAX. */
uint64_t onion_map_next_range(const struct onion_map *map, uint64_t range);
/* Lays a range of `below` (NULL: all HOLE) under the range of the map. A block that is HOLE, or DATA in a segment
 * whose gone[number] is not 0, gets the location that it has in below. If it is HOLE there, it becomes HOLE with
 * `drop`, and stays as it is without `drop`. Readers see each block as before or as after. The caller keeps writers
 * away from the range. -ENOMEM: nothing has changed. */
int onion_map_put_below(struct onion_map *map, uint64_t range, const struct onion_map *below, const unsigned char *gone,
                        int drop);

/* Returns how many blocks are DATA in lower and not HOLE in upper: the slots that a merge of the two frees. */
uint64_t onion_map_count_shadowed(const struct onion_map *lower, const struct onion_map *upper);

#endif
