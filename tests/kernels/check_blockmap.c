/* check_blockmap.c: the block map without Python, for the sanitizers: tools/check_kernels.sh builds and runs it.
 *
 * Three checks. One makes the same random changes to a map and to a plain array, with and without retire, for every
 * block size. One lays layers over each other, and compares whose each block is with an array. The last lets readers
 * look blocks up beside two writers of different ranges: every location that is ever set names its block in the slot,
 * so a reader can tell a location that was set for that block from any other; blocks of the upper half are always
 * mapped, and must never look like a HOLE; a freed leaf is seen by the address sanitizer. Leaves that are retired are
 * freed only when each reader has begun a new look-up since. */
#include "index/blockmap.h"
#include "layer/provenance.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                            \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                 \
        }                                                                            \
    } while (0)

#define MODEL_BLOCKS_MAX 2048
#define MODEL_CHANGES 3000

static uint64_t random_next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}
static uint64_t random_below(uint64_t *state, uint64_t limit) { return random_next(state) % limit; }

/* -- against a plain array ----------------------------------------------------------------------------------- */

static void retire_at_once(void *context, void *leaf) {
    ++*(uint64_t *)context;
    free(leaf);
}

static void expect_same(const struct onion_map *map, const onion_location *locations) {
    struct onion_run run = {0, 0, 0};
    uint64_t at = 0;
    for (uint64_t block = 0; block < map->block_count; block++)
        EXPECT(onion_map_lookup(map, block) == locations[block]);
    while (onion_map_next(map, run.block_index + run.block_count, map->block_count, &run)) {
        for (; at < run.block_index; at++)
            EXPECT(locations[at] == ONION_LOCATION_HOLE);
        for (; at < run.block_index + run.block_count; at++)
            EXPECT(locations[at] == onion_location_advance(run.location, at - run.block_index));
    }
    for (; at < map->block_count; at++)
        EXPECT(locations[at] == ONION_LOCATION_HOLE);
}

static onion_location random_location(uint64_t *state, uint64_t block) {
    switch (random_below(state, 6)) {
    case 0:
        return ONION_LOCATION_HOLE;
    case 1:
        return ONION_LOCATION_ZERO;
    case 2:
        return onion_location_make(ONION_SEGMENT_LAST, ONION_SLOT_LAST - MODEL_BLOCKS_MAX);
    case 3:
        return onion_location_make(1, (uint32_t)random_below(state, 1000));
    default:
        return onion_location_make(2, (uint32_t)block); /* in step with the block: such runs join */
    }
}

static void check_against_array(uint32_t block_shift, uint64_t block_count, onion_retire_fn retire) {
    static onion_location locations[MODEL_BLOCKS_MAX];
    uint64_t state = 0x9e3779b97f4a7c15u + block_shift, retired = 0;
    struct onion_map map;
    memset(locations, 0, sizeof locations);
    EXPECT(onion_map_init(&map, block_count, block_shift) == 0);
    map.retire = retire;
    map.retire_context = &retired;
    for (int change = 0; change < MODEL_CHANGES; change++) {
        uint64_t block = random_below(&state, block_count);
        uint64_t longest = random_below(&state, 20) == 0 ? block_count : 1 + random_below(&state, 5);
        uint64_t count = 1 + random_below(&state, longest);
        onion_location location = random_location(&state, block);
        if (count > block_count - block)
            count = block_count - block;
        EXPECT(onion_map_set(&map, block, count, location) == 0);
        for (uint64_t i = 0; i < count; i++)
            locations[block + i] = onion_location_advance(location, i);
        if (change % 50 == 0)
            expect_same(&map, locations);
    }
    expect_same(&map, locations);
    EXPECT(onion_map_set(&map, 0, block_count, ONION_LOCATION_HOLE) == 0);
    EXPECT(map.leaf_bytes == 0);
    EXPECT(!retire || block_shift == ONION_BLOCK_SHIFT_MAX || retired > 0);
    onion_map_destroy(&map);
    onion_map_destroy(&map);
}

/* -- readers beside writers ---------------------------------------------------------------------------------- */

#define READERS 2
#define WRITERS 2
#define SHARED_RANGES 4
#define SHARED_BLOCKS (SHARED_RANGES * 512u - 100)
#define HOLES_BELOW (SHARED_RANGES / 2 * 512u) /* blocks from here on are mapped before readers begin, and stay so */
#define SHARED_CHANGES 15000
#define RETIRED_MAX 64
#define MANY 100

struct shared {
    struct onion_map map;
    uint64_t looks[READERS]; /* odd while a look-up is under way */
    int writers_left;
    int readers_at_work;
};

struct writer {
    struct shared *shared;
    uint32_t number;
};

struct reader {
    struct shared *shared;
    uint32_t number;
    uint64_t seen;
};

/* One list of retired leaves for each writer. */
static __thread void *retired_leaves[RETIRED_MAX];
static __thread int retired_count;

static void free_when_readers_have_moved_on(struct shared *shared) {
    for (int i = 0; i < READERS; i++) {
        /* An exchange, not a plain load: it must not pass the store that took the leaf out of the root. */
        uint64_t look = __atomic_fetch_add(&shared->looks[i], 0, __ATOMIC_SEQ_CST);
        while ((look & 1) != 0 && __atomic_load_n(&shared->looks[i], __ATOMIC_SEQ_CST) == look)
            sched_yield();
    }
    while (retired_count > 0)
        free(retired_leaves[--retired_count]);
}

static void retire_later(void *context, void *leaf) {
    if (retired_count == RETIRED_MAX)
        free_when_readers_have_moved_on(context);
    retired_leaves[retired_count++] = leaf;
}

/* Three generations of locations; in each the slot tells the block, and the segment the generation. */
static onion_location location_for(uint64_t generation, uint64_t block) {
    return onion_location_make((uint32_t)(generation + 1), (uint32_t)(block + 1000 * generation));
}

static int was_set_for(onion_location location, uint64_t block) {
    if (location == ONION_LOCATION_HOLE)
        return block < HOLES_BELOW;
    if (location == ONION_LOCATION_ZERO)
        return 1;
    uint32_t segment = onion_location_segment(location);
    return segment >= 1 && segment <= 3 && location == location_for(segment - 1, block);
}

/* Writer n owns the ranges r with r % WRITERS == n. */
static void *write_shared(void *argument) {
    struct writer *writer = argument;
    struct shared *shared = writer->shared;
    uint64_t state = 77 + writer->number;
    while (__atomic_load_n(&shared->readers_at_work, __ATOMIC_ACQUIRE) < READERS)
        sched_yield();
    for (int change = 0; change < SHARED_CHANGES; change++) {
        uint64_t range = random_below(&state, SHARED_RANGES / WRITERS) * WRITERS + writer->number;
        uint64_t begin = range * 512, end = begin + 512 < SHARED_BLOCKS ? begin + 512 : SHARED_BLOCKS;
        uint64_t longest = random_below(&state, 60) == 0 ? 512 : 3;
        uint64_t block = longest == 512 ? begin : begin + random_below(&state, end - begin);
        uint64_t count = longest == 512 ? end - begin : 1 + random_below(&state, longest);
        uint64_t kind = random_below(&state, 5);
        if (kind == 4 && block >= HOLES_BELOW)
            kind = 3;
        onion_location location = kind < 3    ? location_for(kind, block)
                                  : kind == 3 ? ONION_LOCATION_ZERO
                                              : ONION_LOCATION_HOLE;
        if (count > end - block)
            count = end - block;
        EXPECT(onion_map_set(&shared->map, block, count, location) == 0);
    }
    free_when_readers_have_moved_on(shared);
    __atomic_fetch_sub(&shared->writers_left, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void read_one(const struct onion_map *map, uint64_t block) {
    EXPECT(was_set_for(onion_map_lookup(map, block), block));
}

static void read_run(const struct onion_map *map, uint64_t block) {
    struct onion_run run;
    onion_map_run_at(map, block, 50, &run);
    EXPECT(run.block_index == block && run.block_count >= 1 && run.block_count <= 50);
    for (uint64_t i = 0; i < run.block_count; i++)
        EXPECT(was_set_for(onion_location_advance(run.location, i), block + i));
}

static void read_next(const struct onion_map *map, uint64_t block) {
    struct onion_run run;
    if (!onion_map_next(map, block, map->block_count, &run))
        return;
    EXPECT(run.block_index >= block && run.block_count <= map->block_count - run.block_index);
    for (uint64_t i = 0; i < run.block_count; i++)
        EXPECT(was_set_for(onion_location_advance(run.location, i), run.block_index + i));
}

static void read_many(const struct onion_map *map, uint64_t *state) {
    uint64_t blocks[MANY];
    onion_location locations[MANY];
    for (int i = 0; i < MANY; i++)
        blocks[i] = random_below(state, map->block_count);
    onion_map_lookup_many(map, blocks, MANY, locations);
    for (int i = 0; i < MANY; i++)
        EXPECT(was_set_for(locations[i], blocks[i]));
}

static void *read_shared(void *argument) {
    struct reader *reader = argument;
    struct shared *shared = reader->shared;
    uint64_t *look = &shared->looks[reader->number], state = 1000 + reader->number;
    __atomic_fetch_add(&shared->readers_at_work, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&shared->writers_left, __ATOMIC_ACQUIRE) > 0) {
        uint64_t block = random_below(&state, shared->map.block_count);
        __atomic_fetch_add(look, 1, __ATOMIC_SEQ_CST);
        switch (reader->seen++ % 4) {
        case 0:
            read_one(&shared->map, block);
            break;
        case 1:
            read_run(&shared->map, block);
            break;
        case 2:
            read_next(&shared->map, block);
            break;
        default:
            read_many(&shared->map, &state);
        }
        __atomic_fetch_add(look, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void check_readers_beside_writers(void) {
    static struct shared shared;
    struct writer writers[WRITERS];
    struct reader readers[READERS];
    pthread_t threads[WRITERS + READERS];
    EXPECT(onion_map_init(&shared.map, SHARED_BLOCKS, ONION_BLOCK_SHIFT_MIN) == 0);
    shared.map.retire = retire_later;
    shared.map.retire_context = &shared;
    shared.writers_left = WRITERS;
    EXPECT(onion_map_set(&shared.map, HOLES_BELOW, SHARED_BLOCKS - HOLES_BELOW, ONION_LOCATION_ZERO) == 0);
    for (uint32_t i = 0; i < READERS; i++) {
        readers[i] = (struct reader){&shared, i, 0};
        EXPECT(pthread_create(&threads[WRITERS + i], NULL, read_shared, &readers[i]) == 0);
    }
    for (uint32_t i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){&shared, i};
        EXPECT(pthread_create(&threads[i], NULL, write_shared, &writers[i]) == 0);
    }
    for (int i = 0; i < WRITERS + READERS; i++)
        EXPECT(pthread_join(threads[i], NULL) == 0);
    for (int i = 0; i < READERS; i++)
        EXPECT(readers[i].seen > 0);
    EXPECT(onion_map_set(&shared.map, 0, SHARED_BLOCKS, ONION_LOCATION_HOLE) == 0);
    EXPECT(shared.map.leaf_bytes == 0);
    free_when_readers_have_moved_on(&shared);
    onion_map_destroy(&shared.map);
}

/* -- whose block each is --------------------------------------------------------------------------------------- */

#define OWNED_BLOCKS 4000
#define OWNED_LAYERS 40

/* Layers of random runs, laid over each other, against an array of provenance: negative where the layer says ZERO. */
static void check_provenance(void) {
    static int layer_of[OWNED_BLOCKS];
    static struct onion_provenance_run runs[OWNED_BLOCKS];
    struct onion_provenance provenance;
    uint64_t state = 7, at = 0;
    EXPECT(onion_provenance_init(&provenance, OWNED_BLOCKS, ONION_BLOCK_SHIFT_MIN) == 0);
    memset(layer_of, 0, sizeof layer_of);
    for (int layer = 1; layer <= OWNED_LAYERS; layer++) {
        struct onion_map upper;
        EXPECT(onion_map_init(&upper, OWNED_BLOCKS, ONION_BLOCK_SHIFT_MIN) == 0);
        for (int run = 0; run < 20; run++) {
            uint64_t block = random_below(&state, OWNED_BLOCKS);
            uint64_t count = random_below(&state, OWNED_BLOCKS - block < 600 ? OWNED_BLOCKS - block : 600) + 1;
            int is_data = random_below(&state, 2) == 0;
            EXPECT(onion_map_set(&upper, block, count, is_data ? onion_location_make(1, 9000) : ONION_LOCATION_ZERO) ==
                   0);
            for (uint64_t i = block; i < block + count; i++)
                layer_of[i] = is_data ? layer : -layer;
        }
        EXPECT(onion_provenance_lay(&provenance, &upper, (uint32_t)layer) == 0);
        onion_map_destroy(&upper);
    }
    EXPECT(onion_provenance_resolve(&provenance) == 0);
    uint64_t count = onion_provenance_runs(&provenance, runs);
    EXPECT(count == onion_provenance_runs(&provenance, NULL));
    for (uint64_t i = 0; i < count; i++) {
        for (; at < runs[i].block_index; at++)
            EXPECT(layer_of[at] == 0);
        for (; at < runs[i].block_index + runs[i].block_count; at++)
            EXPECT(layer_of[at] == (runs[i].state == 1 ? 1 : -1) * (int)runs[i].layer);
        EXPECT(i == 0 || at == OWNED_BLOCKS || layer_of[runs[i].block_index - 1] != layer_of[runs[i].block_index]);
    }
    for (; at < OWNED_BLOCKS; at++)
        EXPECT(layer_of[at] == 0);
    onion_provenance_destroy(&provenance);
}

int main(void) {
    check_provenance();
    for (uint32_t shift = ONION_BLOCK_SHIFT_MIN; shift <= ONION_BLOCK_SHIFT_MAX; shift++) {
        uint64_t block_count = (4u << (ONION_RANGE_BYTES_SHIFT - shift)) - 1;
        check_against_array(shift, block_count, NULL);
        check_against_array(shift, block_count, retire_at_once);
    }
    check_readers_beside_writers();
    return 0;
}
