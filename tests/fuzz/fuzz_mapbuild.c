/* fuzz_mapbuild.c: any changes, in any order and any portions, make the same map through a build as one by one.
 *
 * The first byte says how large a block is; then 8 bytes are a change: what, how long, where, which slot. */
#include <stdlib.h>
#include <string.h>

#include "index/bulk_build.h"

#define BLOCKS 3000 /* some ranges, the last of them not whole */

static void check(int holds) {
    if (!holds)
        abort();
}

static uint64_t number(const uint8_t *bytes, int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; i++)
        value = value << 8 | bytes[i];
    return value;
}

static onion_location location_of(const uint8_t *change) {
    switch (change[0] & 3) {
    case 0:
        return ONION_LOCATION_HOLE;
    case 1:
        return ONION_LOCATION_ZERO;
    default:
        return onion_location_make(1 + (change[0] >> 2 & 7), (uint32_t)number(change + 6, 2));
    }
}

/* Every run the same, and no slot named beyond what the build says. */
static void check_same(const struct onion_map *built, const struct onion_map *set, const uint64_t *slots_end) {
    struct onion_run a = {0, 0, 0}, b = {0, 0, 0};
    int more = 1;
    while (more) {
        more = onion_map_next(built, a.block_index + a.block_count, BLOCKS, &a);
        check(onion_map_next(set, b.block_index + b.block_count, BLOCKS, &b) == more);
        if (!more)
            break;
        check(a.block_index == b.block_index && a.block_count == b.block_count && a.location == b.location);
        if (onion_location_is_data(a.location))
            check(onion_location_slot(a.location) + a.block_count <= slots_end[onion_location_segment(a.location)]);
    }
    for (uint64_t block = 0; block < BLOCKS; block++)
        check(onion_map_lookup(built, block) == onion_map_lookup(set, block));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct onion_map built, set;
    struct onion_build build;
    if (size == 0)
        return 0;
    uint32_t shift = 12 + data[0] % 10;
    check(onion_map_init(&built, BLOCKS, shift) == 0 && onion_map_init(&set, BLOCKS, shift) == 0);
    check(onion_build_init(&build, &built) == 0);
    for (data++, size--; size >= 8; data += 8, size -= 8) {
        uint64_t first = number(data + 3, 3) % (BLOCKS + 10), count = number(data + 1, 2) % (BLOCKS + 10);
        uint64_t inside = first >= BLOCKS ? 0 : count < BLOCKS - first ? count : BLOCKS - first;
        check(onion_build_put(&build, first, count, location_of(data)) == 0);
        check(!inside || onion_map_set(&set, first, inside, location_of(data)) == 0);
        if ((data[0] & 0xe0) == 0xe0)
            check(onion_build_apply(&build) == 0);
    }
    check(onion_build_apply(&build) == 0);
    check_same(&built, &set, build.slots_end);
    onion_build_destroy(&build);
    onion_map_destroy(&built);
    onion_map_destroy(&set);
    return 0;
}
