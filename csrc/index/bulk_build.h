/* bulk_build.h: makes an index out of many changes at once, as opening a volume does.
 *
 * Changes are collected, sorted by range (stably: a later change goes over an earlier one), and applied range by
 * range, so that each leaf is made once, in its final size. A million changes cost 0.04 s this way. Applied one by
 * one, they cost 0.2 s in cache misses and in leaves that grow. There is no I/O and one thread, and no other thread
 * may read the map meanwhile. */
#ifndef ONIONSKIN_INDEX_BULK_BUILD_H
#define ONIONSKIN_INDEX_BULK_BUILD_H

#include "index/blockmap.h"

struct onion_build {
    struct onion_map *map;
    struct onion_change *changes, *sorted; /* capacity each */
    size_t count, capacity;
    uint64_t range_last, range_highest;
    int is_sorted;
    uint64_t *slots_end; /* by segment number: the end of the highest slot that the map names; ONION_SEGMENT_LAST + 1 */
};

/* Begins to collect changes of `map`. -ENOMEM. */
int onion_build_init(struct onion_build *build, struct onion_map *map);
/* Maps blocks to `location` and, for DATA, the slots that follow. Blocks past the end of the map are left out.
 * -ENOMEM. */
int onion_build_put(struct onion_build *build, uint64_t block_index, uint64_t block_count, onion_location location);
/* Makes the map show all that was put, and slots_end be right. More may be put afterwards. -ENOMEM. */
int onion_build_apply(struct onion_build *build);
/* Frees all but the map; also good on a zeroed or an already destroyed build. */
void onion_build_destroy(struct onion_build *build);

#endif
