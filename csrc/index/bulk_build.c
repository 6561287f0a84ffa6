/* bulk_build.c: implements bulk_build.h. The sort is a radix sort by range, lowest digit first, which is stable. */
#include "index/bulk_build.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/sparse_table.h"

#define CHANGES_FIRST ((size_t)1 << 12)
#define CHANGES_MAX ((size_t)1 << 22) /* 64 MiB, twice; so many changes are applied before more are collected */
#define DIGIT_BITS_MAX 11
#define SLOTS_END_BYTES ((ONION_SEGMENT_LAST + 1) * sizeof(uint64_t))

int onion_build_init(struct onion_build *build, struct onion_map *map) {
    memset(build, 0, sizeof *build);
    build->map = map;
    build->is_sorted = 1;
    build->slots_end = onion_sparse_table(SLOTS_END_BYTES);
    return build->slots_end ? 0 : -ENOMEM;
}

void onion_build_destroy(struct onion_build *build) {
    free(build->changes);
    free(build->sorted);
    onion_sparse_table_free(build->slots_end, SLOTS_END_BYTES);
    memset(build, 0, sizeof *build);
}

static int make_room(struct onion_build *build) {
    if (build->count < build->capacity)
        return 0;
    if (build->capacity == CHANGES_MAX)
        return onion_build_apply(build);
    size_t capacity = build->capacity ? 2 * build->capacity : CHANGES_FIRST;
    struct onion_change *changes = realloc(build->changes, capacity * sizeof *changes);
    if (!changes)
        return -ENOMEM;
    build->changes = changes;
    build->capacity = capacity;
    free(build->sorted); /* sort_changes makes it again */
    build->sorted = NULL;
    return 0;
}

int onion_build_put(struct onion_build *build, uint64_t block_index, uint64_t block_count, onion_location location) {
    uint64_t limit = build->map->block_count, at = block_index;
    uint64_t end = block_index >= limit || block_count > limit - block_index ? limit : block_index + block_count;
    uint32_t shift = build->map->range_shift;
    while (at < end) {
        int status = make_room(build);
        if (status < 0)
            return status;
        uint64_t range = at >> shift, range_end = (range + 1) << shift, next = range_end < end ? range_end : end;
        uint32_t block = (uint32_t)(at - (range << shift));
        build->changes[build->count++] = (struct onion_change){onion_change_where(range, block, (uint32_t)(next - at)),
                                                               onion_location_advance(location, at - block_index)};
        build->is_sorted &= range >= build->range_last;
        build->range_last = range;
        build->range_highest = range > build->range_highest ? range : build->range_highest;
        at = next;
    }
    return 0;
}

/* Does one pass of the sort, from `from` to `to`, by the digit of `bits` bits at `shift`. */
static void sort_by_digit(const struct onion_change *from, struct onion_change *to, size_t count, unsigned shift,
                          unsigned bits) {
    size_t starts[(1 << DIGIT_BITS_MAX) + 1] = {0};
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    for (size_t i = 0; i < count; i++)
        starts[(from[i].where >> shift & mask) + 1]++;
    for (uint64_t digit = 0; digit < mask; digit++)
        starts[digit + 1] += starts[digit];
    for (size_t i = 0; i < count; i++)
        to[starts[from[i].where >> shift & mask]++] = from[i];
}

static int sort_changes(struct onion_build *build) {
    if (build->is_sorted)
        return 0;
    if (!build->sorted && !(build->sorted = malloc(build->capacity * sizeof *build->sorted)))
        return -ENOMEM;
    unsigned range_bits = 64 - (unsigned)__builtin_clzll(build->range_highest | 1);
    unsigned passes = (range_bits + DIGIT_BITS_MAX - 1) / DIGIT_BITS_MAX;
    unsigned bits = (range_bits + passes - 1) / passes;
    for (unsigned pass = 0; pass < passes; pass++) {
        sort_by_digit(build->changes, build->sorted, build->count, ONION_CHANGE_RANGE_SHIFT + pass * bits, bits);
        struct onion_change *done = build->sorted;
        build->sorted = build->changes;
        build->changes = done;
    }
    return 0;
}

int onion_build_apply(struct onion_build *build) {
    int status = sort_changes(build);
    if (status == 0)
        status = onion_map_apply(build->map, build->changes, build->count, build->slots_end);
    build->count = 0;
    build->is_sorted = 1;
    build->range_last = build->range_highest = 0;
    return status;
}
