/* provenance.h: says which layer each block of a disk comes from.
 *
 * A layer is a number here, which stands for a layer. The layers of a chain are laid over each other from the bottom up.
 * For each block, only its layer is kept, and whether it is DATA or ZERO. So the runs of one layer that touch are
 * one run, wherever their slots are. Like an opening (index/bulk_build.h), it takes the records of all logs first
 * and makes the index at once, because a map for each layer costs a page for nearly every block that lies alone on
 * a large disk.
 *
 * The functions work on memory only, do no I/O, and are for one thread. After -ENOMEM the work is half done, and
 * only onion_provenance_destroy may be called. */
#ifndef ONIONSKIN_LAYER_PROVENANCE_H
#define ONIONSKIN_LAYER_PROVENANCE_H

#include "index/bulk_build.h"
#include "layer/map_log.h"

#define ONION_PROVENANCE_LAYER_LAST ONION_SEGMENT_LAST /* the first is 1 */

struct onion_provenance {
    struct onion_map map; /* locations of another meaning: see provenance.c */
    struct onion_build build;
};

struct onion_provenance_run {
    uint64_t block_index;
    uint64_t block_count;
    uint32_t layer;
    uint8_t state; /* 1 DATA, 2 ZERO */
    uint8_t unused[3];
};

/* Makes an empty one: no layer owns any of block_count blocks of 1 << block_shift bytes. -ENOMEM, -EINVAL. */
int onion_provenance_init(struct onion_provenance *provenance, uint64_t block_count, uint32_t block_shift);
/* Frees everything; also good on a zeroed or already destroyed one. */
void onion_provenance_destroy(struct onion_provenance *provenance);

/* Lays a layer's map over the layers that were laid before: `layer` owns its blocks that are not HOLE from now on.
 * Blocks past the end of provenance are left out. -ENOMEM. */
int onion_provenance_lay(struct onion_provenance *provenance, const struct onion_map *upper, uint32_t layer);
/* The same from the bytes of a log, from cursor->offset on. Its results and *fault_offset are those of
 * onion_layer_load. A HOLE record takes blocks from their layer, so over other layers it is only for a log without
 * such records (onion_log_has_holes). A SIZE record sets *size_bytes. */
int onion_provenance_lay_log(struct onion_provenance *provenance, const unsigned char *bytes, uint64_t length,
                             struct onion_log_cursor *cursor, uint32_t layer, uint64_t *size_bytes,
                             uint64_t *fault_offset);
/* Makes the map show all laid layers. Call it before onion_provenance_runs. -ENOMEM. */
int onion_provenance_resolve(struct onion_provenance *provenance);
/* Returns how many runs there are, in order and none that continues another, and writes them to `out`, unless NULL. */
uint64_t onion_provenance_runs(const struct onion_provenance *provenance, struct onion_provenance_run *out);

#endif
