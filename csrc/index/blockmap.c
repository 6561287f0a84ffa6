/* blockmap.c: implements the two-level index of blockmap.h. This comment describes how it is packed.
 *
 * A root entry is one u64. Its low two bits are a tag:
 *
 *   0, and the rest 0    every block of the range is HOLE
 *   0                    address of a sparse leaf
 *   1  ENTRY_RUN         the whole range is one run; bits 63..16 are the location of its first block
 *   2  ENTRY_DENSE       address of a dense leaf
 *
 * A sparse leaf is a list of runs in block order. Blocks that no run covers are HOLE. A run is one u64:
 *
 *   63      55 54       48 47         32 31      0
 *   [ block   | length - 1 | segment    | slot    ]      block is counted within the range
 *
 * So the order of the numbers is the order of the blocks, and the low 48 bits are a location. A stretch of more than
 * RUN_BLOCKS_MAX blocks is cut into several runs. New blocks are joined with neighbours that they continue. So a range
 * that fills in order has only a few runs, and ends as one entry of the root.
 *
 * A dense leaf has one location for each block of the range, and counts those that are not HOLE.
 *
 * The last range of a map may be shorter than the others. It never becomes ENTRY_RUN, so ENTRY_RUN always means all of
 * 1 << range_shift blocks, and a resize need not rewrite an entry.
 *
 * `touched` has a bit for each ROOT_PAGE_ENTRIES entries of the root. The bit is set before the first of them stops
 * being HOLE, and is never cleared. Walks use it to skip entries that were never written, so that they do not fault in
 * pages.
 *
 * What a reader may see: root entries, runs and dense locations are loaded and stored as atomic u64, and a published
 * leaf is complete (release; the reader acquires). While readers may run, a sparse leaf changes only by
 *   - one store to a run that keeps its block (its length or location changes), or
 *   - runs that are stored past the end of the list and then published by one store to `count`.
 * Every other change makes a new leaf, stores its address in the root and retires the old leaf. A binary search during
 * the first kind of change is right, because the blocks that it compares stay the same. During the second kind it sees
 * the list as it was before. A dense leaf changes location by location, so a reader during a long write sees some of
 * its blocks as before and some as after. */
#define _GNU_SOURCE
#include "index/blockmap.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ENTRY_TAG_MASK 3u
#define ENTRY_RUN 1u
#define ENTRY_DENSE 2u
#define ENTRY_LOCATION_SHIFT 16

#define RUN_BLOCK_SHIFT 55
#define RUN_LENGTH_SHIFT 48
#define RUN_BLOCKS_MAX 128u
#define LOCATION_MASK (((uint64_t)1 << 48) - 1)

#define RANGE_BLOCKS_MAX 512u
/* A list with more runs than a quarter of the range's blocks (128 of 512) becomes a dense leaf. */
#define SPARSE_SHIFT 2
#define SPARSE_RUNS_MIN 2u
/* When trims leave few blocks in a dense leaf, it becomes a list again, well below the length at which lists become
 * dense. */
#define SPARSE_AGAIN_SHIFT 4

#define ROOT_PAGE_SHIFT 9
#define ROOT_PAGE_ENTRIES ((uint64_t)1 << ROOT_PAGE_SHIFT)
#define ROOT_PAGE_BYTES (ROOT_PAGE_ENTRIES * sizeof(uint64_t))
#define TOUCHED_WORD_ENTRIES (ROOT_PAGE_ENTRIES * 64)

#define LOOKUP_GROUP 32
#define CACHE_LINE_BYTES 64
#define SET_PREFETCH_LINES 5

struct sparse_leaf {
    uint32_t count;
    uint32_t capacity;
    uint64_t runs[];
};

struct dense_leaf {
    uint64_t mapped; /* number of blocks that are not HOLE; only writers use it */
    uint64_t locations[];
};

/* An unpacked run within a range. It may have any length. block_count == 0: there is none. */
struct stretch {
    uint32_t block;
    uint32_t block_count;
    onion_location location;
};

/* A change to a list of runs: runs[at .. at + removed) are replaced by added[0 .. added_count). */
struct splice {
    uint32_t at;
    uint32_t removed;
    uint32_t added_count;
    bool covers_range; /* the whole range has become one stretch */
    onion_location range_location;
    uint64_t added[RANGE_BLOCKS_MAX / RUN_BLOCKS_MAX + 4];
};

/* -- atomics ------------------------------------------------------------------------------------------------- */

static inline uint64_t load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void store(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
/* A relaxed load is enough for a run below a `count` that was acquired. If the run was stored to since, only its own
 * bits matter. */
static inline uint64_t load_relaxed(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }

/* -- entries and runs ---------------------------------------------------------------------------------------- */

static inline uint64_t entry_of_run(onion_location location) { return location << ENTRY_LOCATION_SHIFT | ENTRY_RUN; }
static inline onion_location entry_location(uint64_t entry) { return entry >> ENTRY_LOCATION_SHIFT; }
static inline unsigned entry_tag(uint64_t entry) { return entry & ENTRY_TAG_MASK; }
static inline void *entry_leaf(uint64_t entry) { return (void *)(uintptr_t)(entry & ~(uint64_t)ENTRY_TAG_MASK); }
static inline uint64_t entry_of_sparse(struct sparse_leaf *leaf) { return (uint64_t)(uintptr_t)leaf; }
static inline uint64_t entry_of_dense(struct dense_leaf *leaf) { return (uint64_t)(uintptr_t)leaf | ENTRY_DENSE; }

static inline uint64_t run_pack(uint32_t block, uint32_t block_count, onion_location location) {
    return (uint64_t)block << RUN_BLOCK_SHIFT | (uint64_t)(block_count - 1) << RUN_LENGTH_SHIFT | location;
}
static inline uint32_t run_block(uint64_t run) { return (uint32_t)(run >> RUN_BLOCK_SHIFT); }
static inline uint32_t run_blocks(uint64_t run) {
    return (uint32_t)(run >> RUN_LENGTH_SHIFT & (RUN_BLOCKS_MAX - 1)) + 1;
}
static inline uint32_t run_end(uint64_t run) { return run_block(run) + run_blocks(run); }
static inline onion_location run_location(uint64_t run) { return run & LOCATION_MASK; }

static inline uint32_t range_blocks(const struct onion_map *map) { return 1u << map->range_shift; }

static inline uint32_t sparse_limit(const struct onion_map *map) {
    uint32_t limit = range_blocks(map) >> SPARSE_SHIFT;
    return limit < SPARSE_RUNS_MIN ? SPARSE_RUNS_MIN : limit;
}

/* Returns how many of the runs begin at or before block. */
static inline uint32_t runs_up_to(const uint64_t *runs, uint32_t count, uint32_t block) {
    uint64_t last = (uint64_t)block << RUN_BLOCK_SHIFT | (((uint64_t)1 << RUN_BLOCK_SHIFT) - 1);
    const uint64_t *base = runs;
    if (count == 0)
        return 0;
    while (count > 1) {
        uint32_t half = count / 2;
        base += load_relaxed(base + half) <= last ? half : 0;
        count -= half;
    }
    return (uint32_t)(base - runs) + (load_relaxed(base) <= last);
}

/* -- look-ups ------------------------------------------------------------------------------------------------ */

static inline uint32_t sparse_count(const struct sparse_leaf *leaf) {
    return __atomic_load_n(&leaf->count, __ATOMIC_ACQUIRE);
}

static inline onion_location sparse_lookup(const struct sparse_leaf *leaf, uint32_t block) {
    uint32_t index = runs_up_to(leaf->runs, sparse_count(leaf), block);
    if (index == 0)
        return ONION_LOCATION_HOLE;
    uint64_t run = load(&leaf->runs[index - 1]);
    uint32_t into = block - run_block(run);
    return into < run_blocks(run) ? onion_location_advance(run_location(run), into) : ONION_LOCATION_HOLE;
}

static inline onion_location entry_lookup(uint64_t entry, uint32_t block) {
    if (entry == 0)
        return ONION_LOCATION_HOLE;
    if (entry_tag(entry) == ENTRY_RUN)
        return onion_location_advance(entry_location(entry), block);
    if (entry_tag(entry) == ENTRY_DENSE)
        return load(&((const struct dense_leaf *)entry_leaf(entry))->locations[block]);
    return sparse_lookup(entry_leaf(entry), block);
}

onion_location onion_map_lookup(const struct onion_map *map, uint64_t block_index) {
    assert(block_index < map->block_count);
    uint64_t entry = load(&map->root[block_index >> map->range_shift]);
    return entry_lookup(entry, (uint32_t)(block_index & (range_blocks(map) - 1)));
}

/* Prefetches the cache line of a leaf that a look-up reads first. prefetch_runs comes later, when the count of a sparse
 * leaf is in the cache: it prefetches the lines in the middle of the list, and where the search would end if the runs
 * lay evenly. */
static inline void prefetch_leaf(uint64_t entry, uint32_t block) {
    if (entry_tag(entry) == ENTRY_DENSE)
        __builtin_prefetch(&((const struct dense_leaf *)entry_leaf(entry))->locations[block]);
    else if (entry != 0 && entry_tag(entry) != ENTRY_RUN)
        __builtin_prefetch(entry_leaf(entry));
}

static inline void prefetch_runs(uint64_t entry, uint32_t block, uint32_t range_shift) {
    if (entry == 0 || entry_tag(entry) != 0)
        return;
    const struct sparse_leaf *leaf = entry_leaf(entry);
    uint32_t count = sparse_count(leaf);
    __builtin_prefetch(&leaf->runs[count / 2]);
    __builtin_prefetch(&leaf->runs[(count * block) >> range_shift]);
}

/* Looks one group up. Each pass reads only memory that the pass before has prefetched, so that the cache misses
 * overlap. */
static void lookup_group(const struct onion_map *map, const uint64_t *block_indices, size_t count,
                         onion_location *locations) {
    uint64_t entries[LOOKUP_GROUP];
    uint32_t block_mask = range_blocks(map) - 1;

    for (size_t i = 0; i < count; i++) {
        assert(block_indices[i] < map->block_count);
        __builtin_prefetch(&map->root[block_indices[i] >> map->range_shift]);
    }
    for (size_t i = 0; i < count; i++) {
        entries[i] = load(&map->root[block_indices[i] >> map->range_shift]);
        prefetch_leaf(entries[i], (uint32_t)block_indices[i] & block_mask);
    }
    for (size_t i = 0; i < count; i++)
        prefetch_runs(entries[i], (uint32_t)block_indices[i] & block_mask, map->range_shift);
    for (size_t i = 0; i < count; i++)
        locations[i] = entry_lookup(entries[i], (uint32_t)block_indices[i] & block_mask);
}

void onion_map_lookup_many(const struct onion_map *map, const uint64_t *block_indices, size_t count,
                           onion_location *locations) {
    for (size_t done = 0; done < count; done += LOOKUP_GROUP) {
        size_t group = count - done < LOOKUP_GROUP ? count - done : LOOKUP_GROUP;
        lookup_group(map, block_indices + done, group, locations + done);
    }
}

/* -- runs ---------------------------------------------------------------------------------------------------- */

static struct stretch sparse_stretch_at(const struct sparse_leaf *leaf, uint32_t block, uint32_t block_end) {
    uint32_t count = sparse_count(leaf);
    uint32_t index = runs_up_to(leaf->runs, count, block);
    if (index > 0) {
        uint64_t run = load(&leaf->runs[index - 1]);
        if (block < run_end(run))
            return (struct stretch){block, run_end(run) - block,
                                    onion_location_advance(run_location(run), block - run_block(run))};
    }
    uint32_t hole_end = index < count ? run_block(load(&leaf->runs[index])) : block_end;
    return (struct stretch){block, hole_end - block, ONION_LOCATION_HOLE};
}

static struct stretch dense_stretch_at(const struct dense_leaf *leaf, uint32_t block, uint32_t block_end) {
    onion_location location = load(&leaf->locations[block]);
    uint32_t count = 1;
    while (block + count < block_end &&
           load(&leaf->locations[block + count]) == onion_location_advance(location, count))
        count++;
    return (struct stretch){block, count, location};
}

static struct stretch entry_stretch_at(uint64_t entry, uint32_t block, uint32_t block_end) {
    if (entry == 0)
        return (struct stretch){block, block_end - block, ONION_LOCATION_HOLE};
    if (entry_tag(entry) == ENTRY_RUN)
        return (struct stretch){block, block_end - block, onion_location_advance(entry_location(entry), block)};
    if (entry_tag(entry) == ENTRY_DENSE)
        return dense_stretch_at(entry_leaf(entry), block, block_end);
    return sparse_stretch_at(entry_leaf(entry), block, block_end);
}

void onion_map_run_at(const struct onion_map *map, uint64_t block_index, uint64_t block_limit, struct onion_run *run) {
    assert(block_index < map->block_count && block_limit > 0);
    uint64_t limit = map->block_count - block_index < block_limit ? map->block_count - block_index : block_limit;
    uint32_t block = (uint32_t)(block_index & (range_blocks(map) - 1));
    uint32_t to_range_end = range_blocks(map) - block;
    uint32_t block_end = block + (limit < to_range_end ? (uint32_t)limit : to_range_end);
    struct stretch stretch = entry_stretch_at(load(&map->root[block_index >> map->range_shift]), block, block_end);

    if (stretch.block_count > block_end - block)
        stretch.block_count = block_end - block;
    *run = (struct onion_run){block_index, stretch.block_count, stretch.location};
}

/* Returns the first block at or after block_index whose root entry is not HOLE, or block_end or more if there is
 * none. */
static uint64_t skip_hole_ranges(const struct onion_map *map, uint64_t block_index, uint64_t block_end) {
    uint64_t range = block_index >> map->range_shift;
    uint64_t last = (block_end - 1) >> map->range_shift;
    if (load(&map->root[range]) != 0)
        return block_index;
    while (range <= last) {
        uint64_t page = range >> ROOT_PAGE_SHIFT;
        uint64_t touched = load(&map->touched[page / 64]);
        if (touched == 0)
            range = (range | (TOUCHED_WORD_ENTRIES - 1)) + 1;
        else if ((touched >> page % 64 & 1) == 0)
            range = (range | (ROOT_PAGE_ENTRIES - 1)) + 1;
        else if (load(&map->root[range]) == 0)
            range++;
        else
            break;
    }
    if (range > last)
        return block_end;
    return range << map->range_shift > block_index ? range << map->range_shift : block_index;
}

int onion_map_next(const struct onion_map *map, uint64_t block_index, uint64_t block_end, struct onion_run *run) {
    struct onion_run more;
    uint64_t block_count = __atomic_load_n(&map->block_count, __ATOMIC_ACQUIRE);
    if (block_end > block_count)
        block_end = block_count;
    for (;;) {
        if (block_index >= block_end)
            return 0;
        block_index = skip_hole_ranges(map, block_index, block_end);
        if (block_index >= block_end)
            return 0;
        onion_map_run_at(map, block_index, block_end - block_index, run);
        if (run->location != ONION_LOCATION_HOLE)
            break;
        block_index += run->block_count;
    }
    while ((block_index = run->block_index + run->block_count) < block_end) {
        onion_map_run_at(map, block_index, block_end - block_index, &more);
        if (more.location != onion_location_advance(run->location, run->block_count))
            break;
        run->block_count += more.block_count;
    }
    return 1;
}

/* -- leaves -------------------------------------------------------------------------------------------------- */

/* Returns the memory that malloc uses for a request: 8 bytes more, rounded up to 16, and at least 32. */
static size_t malloc_bytes(size_t bytes) {
    size_t taken = (bytes + 8 + 15) & ~(size_t)15;
    return taken < 32 ? 32 : taken;
}

static size_t sparse_bytes(uint32_t capacity) { return sizeof(struct sparse_leaf) + capacity * sizeof(uint64_t); }
static size_t dense_bytes(const struct onion_map *map) {
    return sizeof(struct dense_leaf) + range_blocks(map) * sizeof(uint64_t);
}

/* Leaves room for an eighth more runs, and makes the number even, because malloc would round up to that anyway. */
static uint32_t sparse_capacity(uint32_t count) { return (count + count / 8 + 1) & ~1u; }

static void *leaf_alloc(struct onion_map *map, size_t bytes) {
    void *leaf = malloc(bytes);
    if (leaf)
        __atomic_fetch_add(&map->leaf_bytes, (int64_t)malloc_bytes(bytes), __ATOMIC_RELAXED);
    return leaf;
}

static size_t entry_leaf_bytes(const struct onion_map *map, uint64_t entry) {
    if (entry == 0 || entry_tag(entry) == ENTRY_RUN)
        return 0;
    if (entry_tag(entry) == ENTRY_DENSE)
        return dense_bytes(map);
    return sparse_bytes(((const struct sparse_leaf *)entry_leaf(entry))->capacity);
}

static void touch_root(struct onion_map *map, uint64_t range) {
    uint64_t page = range >> ROOT_PAGE_SHIFT;
    uint64_t bit = (uint64_t)1 << page % 64;
    if ((load(&map->touched[page / 64]) & bit) == 0)
        __atomic_fetch_or(&map->touched[page / 64], bit, __ATOMIC_ACQ_REL);
}

/* Publishes an entry, and retires or frees the leaf of the entry that it replaces. */
static void replace_entry(struct onion_map *map, uint64_t range, uint64_t old, uint64_t entry) {
    if (entry == old)
        return;
    if (old == 0)
        touch_root(map, range);
    store(&map->root[range], entry);

    size_t bytes = entry_leaf_bytes(map, old);
    if (bytes == 0)
        return;
    __atomic_fetch_sub(&map->leaf_bytes, (int64_t)malloc_bytes(bytes), __ATOMIC_RELAXED);
    if (map->retire)
        map->retire(map->retire_context, entry_leaf(old));
    else
        free(entry_leaf(old));
}

/* -- a change to a list of runs ------------------------------------------------------------------------------ */

static struct stretch unpack(uint64_t run) {
    return (struct stretch){run_block(run), run_blocks(run), run_location(run)};
}

static bool continues(const struct stretch *before, const struct stretch *after) {
    return before->block + before->block_count == after->block &&
           onion_location_advance(before->location, before->block_count) == after->location;
}

/* Cuts a stretch into runs. Returns how many. */
static uint32_t pack_runs(struct stretch stretch, uint64_t *runs) {
    uint32_t count = 0;
    for (uint32_t into = 0; into < stretch.block_count; into += RUN_BLOCKS_MAX) {
        uint32_t left = stretch.block_count - into;
        runs[count++] = run_pack(stretch.block + into, left < RUN_BLOCKS_MAX ? left : RUN_BLOCKS_MAX,
                                 onion_location_advance(stretch.location, into));
    }
    return count;
}

static void join_before(const uint64_t *runs, uint32_t *first, struct stretch *stretch) {
    while (*first > 0) {
        struct stretch before = unpack(runs[*first - 1]);
        if (!continues(&before, stretch))
            return;
        before.block_count += stretch->block_count;
        *stretch = before;
        --*first;
    }
}

static void join_after(const uint64_t *runs, uint32_t count, uint32_t *last, struct stretch *stretch) {
    while (*last < count) {
        struct stretch after = unpack(runs[*last]);
        if (!continues(stretch, &after))
            return;
        stretch->block_count += after.block_count;
        ++*last;
    }
}

/* Takes out of a change the runs that it would write again unchanged. So a write in order is an append or a longer last
 * run, which needs no new leaf. */
static void splice_narrow(struct splice *splice, const uint64_t *runs) {
    uint32_t same = 0;
    while (same < splice->removed && same < splice->added_count && runs[splice->at + same] == splice->added[same])
        same++;
    memmove(splice->added, splice->added + same, (splice->added_count - same) * sizeof(uint64_t));
    splice->at += same;
    splice->removed -= same;
    splice->added_count -= same;
    while (splice->removed > 0 && splice->added_count > 0 &&
           runs[splice->at + splice->removed - 1] == splice->added[splice->added_count - 1]) {
        splice->removed--;
        splice->added_count--;
    }
}

/* Plans the change that `put` makes to a list of runs. Runs that it covers are removed, the parts of runs on either
 * side of it stay, and runs that continue each other are joined. */
static struct splice splice_plan(const uint64_t *runs, uint32_t count, struct stretch put, uint32_t range_block_count) {
    struct stretch left = {0, 0, 0}, right = {0, 0, 0};
    uint32_t put_end = put.block + put.block_count;
    uint32_t first = runs_up_to(runs, count, put.block);
    if (first > 0 && run_end(runs[first - 1]) > put.block)
        first--;
    uint32_t last = first;
    while (last < count && run_block(runs[last]) < put_end)
        last++;

    if (first < last && run_block(runs[first]) < put.block) {
        left = unpack(runs[first]);
        left.block_count = put.block - left.block;
    }
    if (first < last && run_end(runs[last - 1]) > put_end) {
        struct stretch over = unpack(runs[last - 1]);
        uint32_t into = put_end - over.block;
        right = (struct stretch){put_end, over.block_count - into, onion_location_advance(over.location, into)};
    }
    if (put.location == ONION_LOCATION_HOLE)
        put.block_count = 0;
    if (put.block_count && left.block_count && continues(&left, &put)) {
        put = (struct stretch){left.block, left.block_count + put.block_count, left.location};
        left.block_count = 0;
    }
    if (put.block_count && right.block_count && continues(&put, &right)) {
        put.block_count += right.block_count;
        right.block_count = 0;
    }
    if (put.block_count && !left.block_count)
        join_before(runs, &first, &put);
    if (put.block_count && !right.block_count)
        join_after(runs, count, &last, &put);

    struct splice splice = {.at = first, .removed = last - first, .range_location = put.location};
    splice.covers_range = put.block_count == range_block_count;
    splice.added_count = pack_runs(left, splice.added);
    splice.added_count += pack_runs(put, splice.added + splice.added_count);
    splice.added_count += pack_runs(right, splice.added + splice.added_count);
    splice_narrow(&splice, runs);
    return splice;
}

/* Changes a leaf in place, if readers then see nothing but the state before or the state after. Returns whether it
 * did. */
static bool splice_in_place(const struct onion_map *map, struct sparse_leaf *leaf, const struct splice *splice) {
    uint32_t count = leaf->count - splice->removed + splice->added_count;
    uint64_t *at = leaf->runs + splice->at;

    if (splice->removed == 1 && splice->added_count == 1 && run_block(*at) == run_block(splice->added[0])) {
        store(at, splice->added[0]);
        return true;
    }
    if (count > leaf->capacity)
        return false;
    if (splice->removed == 0 && splice->at == leaf->count) {
        for (uint32_t i = 0; i < splice->added_count; i++)
            __atomic_store_n(at + i, splice->added[i], __ATOMIC_RELAXED);
        __atomic_store_n(&leaf->count, count, __ATOMIC_RELEASE);
        return true;
    }
    if (map->retire || sparse_capacity(count) < leaf->capacity / 2)
        return false;
    memmove(at + splice->added_count, at + splice->removed,
            (leaf->count - splice->at - splice->removed) * sizeof(uint64_t));
    memcpy(at, splice->added, splice->added_count * sizeof(uint64_t));
    leaf->count = count;
    return true;
}

static struct sparse_leaf *splice_copy(struct onion_map *map, const uint64_t *runs, uint32_t count,
                                       const struct splice *splice) {
    uint32_t new_count = count - splice->removed + splice->added_count;
    uint32_t capacity = sparse_capacity(new_count);
    struct sparse_leaf *leaf = leaf_alloc(map, sparse_bytes(capacity));
    if (!leaf)
        return NULL;
    leaf->count = new_count;
    leaf->capacity = capacity;
    uint32_t kept_from = splice->at + splice->removed;
    memcpy(leaf->runs, runs, splice->at * sizeof(uint64_t));
    memcpy(leaf->runs + splice->at, splice->added, splice->added_count * sizeof(uint64_t));
    memcpy(leaf->runs + splice->at + splice->added_count, runs + kept_from, (count - kept_from) * sizeof(uint64_t));
    return leaf;
}

/* -- dense leaves -------------------------------------------------------------------------------------------- */

static void dense_put(struct dense_leaf *leaf, struct stretch put) {
    for (uint32_t i = 0; i < put.block_count; i++) {
        uint64_t *at = &leaf->locations[put.block + i];
        leaf->mapped -= *at != ONION_LOCATION_HOLE;
        store(at, onion_location_advance(put.location, i));
    }
    if (put.location != ONION_LOCATION_HOLE)
        leaf->mapped += put.block_count;
}

static struct dense_leaf *dense_from_runs(struct onion_map *map, const uint64_t *runs, uint32_t count) {
    struct dense_leaf *leaf = leaf_alloc(map, dense_bytes(map));
    if (!leaf)
        return NULL;
    memset(leaf, 0, dense_bytes(map));
    for (uint32_t i = 0; i < count; i++)
        dense_put(leaf, unpack(runs[i]));
    return leaf;
}

static struct sparse_leaf *sparse_from_dense(struct onion_map *map, const struct dense_leaf *dense) {
    uint64_t runs[RANGE_BLOCKS_MAX];
    uint32_t count = 0, blocks = range_blocks(map);
    for (uint32_t block = 0; block < blocks;) {
        struct stretch stretch = dense_stretch_at(dense, block, blocks);
        if (stretch.location != ONION_LOCATION_HOLE)
            count += pack_runs(stretch, runs + count);
        block += stretch.block_count;
    }
    struct splice all_kept = {.at = count};
    return splice_copy(map, runs, count, &all_kept);
}

static bool dense_is_one_run(const struct onion_map *map, const struct dense_leaf *leaf) {
    uint32_t last = range_blocks(map) - 1;
    return leaf->mapped == range_blocks(map) &&
           leaf->locations[last] == onion_location_advance(leaf->locations[0], last) &&
           dense_stretch_at(leaf, 0, last + 1).block_count == last + 1;
}

static void set_in_dense(struct onion_map *map, uint64_t range, uint64_t entry, struct stretch put) {
    struct dense_leaf *leaf = entry_leaf(entry);
    dense_put(leaf, put);
    if (leaf->mapped == 0) {
        replace_entry(map, range, entry, 0);
    } else if (dense_is_one_run(map, leaf)) {
        replace_entry(map, range, entry, entry_of_run(leaf->locations[0]));
    } else if (put.location == ONION_LOCATION_HOLE && leaf->mapped <= range_blocks(map) >> SPARSE_AGAIN_SHIFT) {
        struct sparse_leaf *sparse = sparse_from_dense(map, leaf);
        if (sparse) /* without memory the dense leaf stays, which is right too, only larger */
            replace_entry(map, range, entry, entry_of_sparse(sparse));
    }
}

/* -- sets ---------------------------------------------------------------------------------------------------- */

static int become_dense(struct onion_map *map, uint64_t range, uint64_t entry, const uint64_t *runs, uint32_t count,
                        struct stretch put) {
    struct dense_leaf *leaf = dense_from_runs(map, runs, count);
    if (!leaf)
        return -ENOMEM;
    dense_put(leaf, put);
    replace_entry(map, range, entry, entry_of_dense(leaf));
    return 0;
}

/* Prefetches the first lines of a leaf together, because a binary search would miss on them one after the other. */
static inline void prefetch_whole_leaf(const struct sparse_leaf *leaf) {
    for (int line = 0; line < SET_PREFETCH_LINES; line++)
        __builtin_prefetch((const char *)leaf + line * CACHE_LINE_BYTES);
}

/* Sets blocks in a range whose entry is HOLE, a whole-range run or a sparse leaf. Each of these is treated as a list of
 * runs. */
static int set_in_runs(struct onion_map *map, uint64_t range, uint64_t entry, struct stretch put) {
    uint64_t whole_range[RANGE_BLOCKS_MAX / RUN_BLOCKS_MAX];
    struct sparse_leaf *leaf = entry_tag(entry) == ENTRY_RUN ? NULL : entry_leaf(entry);
    const uint64_t *runs = leaf ? leaf->runs : whole_range;
    if (leaf)
        prefetch_whole_leaf(leaf);
    uint32_t count = leaf ? leaf->count : 0;
    if (entry_tag(entry) == ENTRY_RUN)
        count = pack_runs((struct stretch){0, range_blocks(map), entry_location(entry)}, whole_range);

    struct splice splice = splice_plan(runs, count, put, range_blocks(map));
    uint32_t new_count = count - splice.removed + splice.added_count;
    if (splice.removed == 0 && splice.added_count == 0)
        return 0;
    if (splice.covers_range || new_count == 0) {
        replace_entry(map, range, entry, new_count == 0 ? 0 : entry_of_run(splice.range_location));
        return 0;
    }
    if (new_count > sparse_limit(map))
        return become_dense(map, range, entry, runs, count, put);
    if (leaf && splice_in_place(map, leaf, &splice))
        return 0;
    struct sparse_leaf *copy = splice_copy(map, runs, count, &splice);
    if (!copy)
        return -ENOMEM;
    replace_entry(map, range, entry, entry_of_sparse(copy));
    return 0;
}

static int set_range(struct onion_map *map, uint64_t range, struct stretch put) {
    uint64_t entry = load(&map->root[range]);
    if (put.block_count == range_blocks(map)) {
        replace_entry(map, range, entry, put.location == ONION_LOCATION_HOLE ? 0 : entry_of_run(put.location));
        return 0;
    }
    if (entry_tag(entry) == ENTRY_DENSE) {
        set_in_dense(map, range, entry, put);
        return 0;
    }
    return set_in_runs(map, range, entry, put);
}

int onion_map_set(struct onion_map *map, uint64_t block_index, uint64_t block_count, onion_location location) {
    assert(block_index <= map->block_count && block_count <= map->block_count - block_index);
    uint64_t at = block_index, end = block_index + block_count;
    while (at < end) {
        if (location == ONION_LOCATION_HOLE && (at = skip_hole_ranges(map, at, end)) >= end)
            break;
        uint32_t block = (uint32_t)(at & (range_blocks(map) - 1));
        uint32_t to_range_end = range_blocks(map) - block;
        uint32_t count = end - at < to_range_end ? (uint32_t)(end - at) : to_range_end;
        struct stretch put = {block, count, onion_location_advance(location, at - block_index)};
        int status = set_range(map, at >> map->range_shift, put);
        if (status < 0)
            return status;
        at += count;
    }
    return 0;
}

/* -- many changes at once ------------------------------------------------------------------------------------ */

/* A range in unpacked form: which of its blocks are mapped, and their locations. */
struct open_range {
    uint64_t mapped[RANGE_BLOCKS_MAX / 64];
    onion_location locations[RANGE_BLOCKS_MAX];
};

static void open_put(struct open_range *open, struct stretch put) {
    for (uint32_t i = put.block; i < put.block + put.block_count; i++) {
        uint64_t bit = (uint64_t)1 << i % 64;
        open->locations[i] = onion_location_advance(put.location, i - put.block);
        open->mapped[i / 64] =
            put.location == ONION_LOCATION_HOLE ? open->mapped[i / 64] & ~bit : open->mapped[i / 64] | bit;
    }
}

static bool open_is_mapped(const struct open_range *open, uint32_t block) {
    return open->mapped[block / 64] >> block % 64 & 1;
}

/* Returns the next stretch of mapped blocks at or after *block; its length is 0 at the end. Moves *block to its end. */
static struct stretch open_next(const struct open_range *open, uint32_t *block, uint32_t block_end) {
    uint32_t at = *block;
    while (at < block_end && !open_is_mapped(open, at)) {
        uint64_t rest = open->mapped[at / 64] >> at % 64;
        at = rest ? at + (uint32_t)__builtin_ctzll(rest) : (at | 63) + 1;
    }
    struct stretch stretch = {at, 0, at < block_end ? open->locations[at] : ONION_LOCATION_HOLE};
    while (at < block_end && open_is_mapped(open, at) &&
           open->locations[at] == onion_location_advance(stretch.location, at - stretch.block))
        at++;
    stretch.block_count = at - stretch.block;
    *block = at;
    return stretch;
}

static void open_entry(const struct onion_map *map, uint64_t entry, struct open_range *open) {
    uint32_t blocks = range_blocks(map);
    memset(open->mapped, 0, sizeof open->mapped);
    for (uint32_t block = 0; entry != 0 && block < blocks;) {
        struct stretch stretch = entry_stretch_at(entry, block, blocks);
        if (stretch.location != ONION_LOCATION_HOLE)
            open_put(open, stretch);
        block += stretch.block_count;
    }
}

static void raise_slots_end(uint64_t *slots_end, const struct stretch *stretch) {
    if (!slots_end || !onion_location_is_data(stretch->location))
        return;
    uint64_t end = (uint64_t)onion_location_slot(stretch->location) + stretch->block_count;
    uint64_t *highest = &slots_end[onion_location_segment(stretch->location)];
    *highest = end > *highest ? end : *highest;
}

/* Packs an open range into an entry of the root, in the smallest form that it fits. */
static int pack_range(struct onion_map *map, const struct open_range *open, uint64_t *slots_end, uint64_t *entry) {
    uint64_t runs[RANGE_BLOCKS_MAX + RANGE_BLOCKS_MAX / RUN_BLOCKS_MAX];
    uint32_t count = 0, block = 0, blocks = range_blocks(map);
    struct stretch stretch;
    while ((stretch = open_next(open, &block, blocks)).block_count) {
        raise_slots_end(slots_end, &stretch);
        if (stretch.block_count == blocks) {
            *entry = entry_of_run(stretch.location);
            return 0;
        }
        count += pack_runs(stretch, runs + count);
    }
    if (count > sparse_limit(map)) {
        struct dense_leaf *dense = dense_from_runs(map, runs, count);
        *entry = entry_of_dense(dense);
        return dense ? 0 : -ENOMEM;
    }
    struct splice all_kept = {.at = count};
    struct sparse_leaf *sparse = count ? splice_copy(map, runs, count, &all_kept) : NULL;
    *entry = count ? entry_of_sparse(sparse) : 0;
    return count && !sparse ? -ENOMEM : 0;
}

static struct stretch change_stretch(const struct onion_change *piece) {
    return (struct stretch){(uint32_t)piece->where >> 10 & 1023, (uint32_t)piece->where & 1023, piece->location};
}

/* Applies changes of one range to its entry. */
static int apply_in_range(struct onion_map *map, uint64_t range, const struct onion_change *changes, size_t count,
                          uint64_t *slots_end) {
    struct open_range open;
    uint64_t old = map->root[range], entry;
    struct stretch last = change_stretch(&changes[count - 1]);
    int status = 0;
    if (last.block_count == range_blocks(map)) { /* it replaces all changes before it */
        entry = last.location == ONION_LOCATION_HOLE ? 0 : entry_of_run(last.location);
        raise_slots_end(slots_end, &last);
    } else {
        open_entry(map, old, &open);
        for (size_t i = 0; i < count; i++)
            open_put(&open, change_stretch(&changes[i]));
        status = pack_range(map, &open, slots_end, &entry);
    }
    if (status == 0)
        replace_entry(map, range, old, entry);
    return status;
}

int onion_map_apply(struct onion_map *map, const struct onion_change *changes, size_t count, uint64_t *slots_end) {
    assert(!map->retire);
    for (size_t first = 0, end; first < count; first = end) {
        uint64_t range = changes[first].where >> ONION_CHANGE_RANGE_SHIFT;
        for (end = first + 1; end < count && changes[end].where >> ONION_CHANGE_RANGE_SHIFT == range; end++)
            ;
        int status = apply_in_range(map, range, changes + first, end - first, slots_end);
        if (status < 0)
            return status;
    }
    return 0;
}

/* -- blocks from below ---------------------------------------------------------------------------------------- */

uint64_t onion_map_next_range(const struct onion_map *map, uint64_t range) {
    if (range >= map->root_count)
        return UINT64_MAX;
    uint64_t block = skip_hole_ranges(map, range << map->range_shift, map->block_count);
    return block < map->block_count ? block >> map->range_shift : UINT64_MAX;
}

static bool is_gone(onion_location location, const unsigned char *gone) {
    return onion_location_is_data(location) && gone[onion_location_segment(location)];
}

/* Returns whether an entry has a block in a segment that is gone, or a block that is HOLE while the range below is
 * not. */
static bool entry_gives_way(const struct onion_map *map, uint64_t entry, bool below_has, const unsigned char *gone) {
    for (uint32_t block = 0, blocks = range_blocks(map); block < blocks;) {
        struct stretch stretch = entry_stretch_at(entry, block, blocks);
        if (stretch.location == ONION_LOCATION_HOLE ? below_has : is_gone(stretch.location, gone))
            return true;
        block += stretch.block_count;
    }
    return false;
}

/* Fills an open range from `entry` of another map, in blocks that are HOLE or in a segment that is gone. */
static void open_put_below(const struct onion_map *map, struct open_range *open, uint64_t entry,
                           const unsigned char *gone, bool drop) {
    for (uint32_t block = 0, blocks = range_blocks(map); block < blocks; block++) {
        if (open_is_mapped(open, block) && !is_gone(open->locations[block], gone))
            continue;
        onion_location location = entry_lookup(entry, block);
        if (location != ONION_LOCATION_HOLE || drop)
            open_put(open, (struct stretch){block, 1, location});
    }
}

int onion_map_put_below(struct onion_map *map, uint64_t range, const struct onion_map *below, const unsigned char *gone,
                        int drop) {
    struct open_range open;
    uint64_t old = load(&map->root[range]), entry;
    uint64_t under = below && range < below->root_count ? load(&below->root[range]) : 0;
    if (!entry_gives_way(map, old, under != 0, gone))
        return 0;
    open_entry(map, old, &open);
    open_put_below(map, &open, under, gone, drop);
    int status = pack_range(map, &open, NULL, &entry);
    if (status == 0)
        replace_entry(map, range, old, entry);
    return status;
}

/* -- two maps ------------------------------------------------------------------------------------------------ */

static uint64_t blocks_of_both(const struct onion_map *lower, const struct onion_map *upper) {
    return lower->block_count < upper->block_count ? lower->block_count : upper->block_count;
}

int onion_map_fold(struct onion_map *lower, const struct onion_map *upper, const uint16_t *renumber) {
    uint64_t end = blocks_of_both(lower, upper);
    struct onion_run run = {0, 0, 0};
    while (onion_map_next(upper, run.block_index + run.block_count, end, &run)) {
        onion_location location = run.location;
        if (renumber && onion_location_is_data(location))
            location = onion_location_make(renumber[onion_location_segment(location)], onion_location_slot(location));
        int status = onion_map_set(lower, run.block_index, run.block_count, location);
        if (status < 0)
            return status;
    }
    return 0;
}

uint64_t onion_map_count_shadowed(const struct onion_map *lower, const struct onion_map *upper) {
    uint64_t end = blocks_of_both(lower, upper), shadowed = 0;
    struct onion_run above = {0, 0, 0};
    while (onion_map_next(upper, above.block_index + above.block_count, end, &above)) {
        uint64_t above_end = above.block_index + above.block_count;
        struct onion_run below = {above.block_index, 0, 0};
        while (onion_map_next(lower, below.block_index + below.block_count, above_end, &below))
            if (onion_location_is_data(below.location))
                shadowed += below.block_count;
    }
    return shadowed;
}

/* -- the map itself ------------------------------------------------------------------------------------------ */

static uint64_t ranges_for(uint64_t block_count, uint32_t range_shift) {
    return (block_count >> range_shift) + ((block_count & (((uint64_t)1 << range_shift) - 1)) != 0);
}

static size_t root_bytes_for(uint64_t root_count) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t bytes = (root_count * sizeof(uint64_t) + page - 1) & ~(page - 1);
    return bytes ? bytes : page;
}

static size_t touched_words_for(uint64_t root_count) { return root_count / TOUCHED_WORD_ENTRIES + 1; }

/* A disk has at most 2^63 - 1 bytes, like a file. */
static bool block_count_fits(uint64_t block_count, uint32_t range_shift) {
    return block_count <= (uint64_t)INT64_MAX >> (ONION_RANGE_BYTES_SHIFT - range_shift);
}

/* Maps the root without huge pages: there is a map for each layer, and a map with a few distant entries should cost
 * only pages of 4 KiB. */
static void *root_map(size_t bytes) {
    void *root = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (root == MAP_FAILED)
        return NULL;
    (void)madvise(root, bytes, MADV_NOHUGEPAGE);
    return root;
}

int onion_map_init(struct onion_map *map, uint64_t block_count, uint32_t block_shift) {
    memset(map, 0, sizeof *map);
    if (block_shift < ONION_BLOCK_SHIFT_MIN || block_shift > ONION_BLOCK_SHIFT_MAX)
        return -EINVAL;
    uint32_t range_shift = ONION_RANGE_BYTES_SHIFT - block_shift;
    if (!block_count_fits(block_count, range_shift))
        return -EINVAL;
    uint64_t root_count = ranges_for(block_count, range_shift);
    uint64_t *touched = calloc(touched_words_for(root_count), sizeof *touched);
    uint64_t *root = root_map(root_bytes_for(root_count));
    if (!touched || !root) {
        free(touched);
        if (root)
            munmap(root, root_bytes_for(root_count));
        return -ENOMEM;
    }
    map->root = root;
    map->root_count = root_count;
    map->root_bytes = root_bytes_for(root_count);
    map->touched = touched;
    map->block_count = block_count;
    map->range_shift = range_shift;
    return 0;
}

void onion_map_destroy(struct onion_map *map) {
    uint64_t at = 0;
    if (!map->root)
        return;
    while (at < map->block_count && (at = skip_hole_ranges(map, at, map->block_count)) < map->block_count) {
        uint64_t range = at >> map->range_shift;
        if (entry_leaf_bytes(map, map->root[range]))
            free(entry_leaf(map->root[range]));
        at = (range + 1) << map->range_shift;
    }
    munmap(map->root, map->root_bytes);
    free(map->touched);
    memset(map, 0, sizeof *map);
}

static int touched_grow(struct onion_map *map, uint64_t root_count) {
    size_t old_words = touched_words_for(map->root_count), words = touched_words_for(root_count);
    if (words <= old_words)
        return 0;
    uint64_t *touched = realloc(map->touched, words * sizeof *touched);
    if (!touched)
        return -ENOMEM;
    memset(touched + old_words, 0, (words - old_words) * sizeof *touched);
    map->touched = touched;
    return 0;
}

int onion_map_resize(struct onion_map *map, uint64_t block_count) {
    struct onion_run past_end;
    (void)past_end;
    assert(onion_map_next(map, block_count, map->block_count, &past_end) == 0);
    if (!block_count_fits(block_count, map->range_shift))
        return -EINVAL;
    uint64_t root_count = ranges_for(block_count, map->range_shift);
    size_t root_bytes = root_bytes_for(root_count);
    if (touched_grow(map, root_count) < 0)
        return -ENOMEM;
    if (root_bytes != map->root_bytes) {
        void *root = mremap(map->root, map->root_bytes, root_bytes, MREMAP_MAYMOVE);
        if (root == MAP_FAILED)
            return -ENOMEM;
        map->root = root;
        map->root_bytes = root_bytes;
    }
    map->root_count = root_count;
    map->block_count = block_count;
    return 0;
}

void onion_old_root_free(struct onion_old_root *old) {
    munmap(old->root, old->root_bytes);
    free(old->touched);
    free(old);
}

/* Copies the pages of the root that were touched. Other pages are not faulted in. */
static void copy_root(const struct onion_map *map, uint64_t *root, uint64_t *touched) {
    for (size_t word = 0; word < touched_words_for(map->root_count); word++) {
        touched[word] = load(&map->touched[word]);
        for (uint64_t bits = touched[word]; bits; bits &= bits - 1) {
            uint64_t first = (word * 64 + (uint64_t)__builtin_ctzll(bits)) * ROOT_PAGE_ENTRIES;
            uint64_t left = map->root_count - first;
            memcpy(root + first, map->root + first,
                   (left < ROOT_PAGE_ENTRIES ? left : ROOT_PAGE_ENTRIES) * sizeof(uint64_t));
        }
    }
}

/* A reader loads block_count before root and touched, so its count is never too large for them. */
int onion_map_grow(struct onion_map *map, uint64_t block_count, struct onion_old_root **old) {
    uint64_t root_count = ranges_for(block_count, map->range_shift);
    *old = NULL;
    if (block_count <= map->block_count)
        return 0;
    if (!block_count_fits(root_count << map->range_shift, map->range_shift))
        return -EINVAL;
    size_t root_bytes = root_bytes_for(root_count);
    struct onion_old_root *left = malloc(sizeof *left);
    uint64_t *touched = calloc(touched_words_for(root_count), sizeof *touched);
    uint64_t *root = left && touched ? root_map(root_bytes) : NULL;
    if (!root) {
        free(left);
        free(touched);
        return -ENOMEM;
    }
    copy_root(map, root, touched);
    *left = (struct onion_old_root){map->root, map->touched, map->root_bytes};
    __atomic_store_n(&map->touched, touched, __ATOMIC_RELEASE);
    __atomic_store_n(&map->root, root, __ATOMIC_RELEASE);
    map->root_bytes = root_bytes;
    __atomic_store_n(&map->root_count, root_count, __ATOMIC_RELEASE);
    __atomic_store_n(&map->block_count, root_count << map->range_shift, __ATOMIC_RELEASE);
    *old = left;
    return 0;
}

uint64_t onion_map_memory(const struct onion_map *map) {
    if (!map->root)
        return 0;
    size_t words = touched_words_for(map->root_count);
    uint64_t pages = 0;
    for (size_t i = 0; i < words; i++)
        pages += (uint64_t)__builtin_popcountll(load(&map->touched[i]));
    int64_t leaf_bytes = __atomic_load_n(&map->leaf_bytes, __ATOMIC_RELAXED);
    return (uint64_t)leaf_bytes + pages * ROOT_PAGE_BYTES + malloc_bytes(words * sizeof(uint64_t));
}
