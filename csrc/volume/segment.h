/* segment.h: one data file: its header, its mapping, and the allocation of slots in a segment that the head writes.
 *
 * Slot i of a segment lies at byte ONION_HEADER_BYTES + (i << block_shift). Readers load from a shared read-only
 * mapping. Writers use pwrite, so that a full disk is an error and not a signal. A segment that is only read costs
 * no descriptor: it is opened to be mapped, and closed again.
 *
 * What must hold: a slot that any durable map names is never handed out. Slots are given back only by
 * onion_segment_give_back. Its caller makes sure that the frame that freed them is durable, and that no read that might
 * have found them is still under way. A lock of the caller guards the allocation. */
#ifndef ONIONSKIN_VOLUME_SEGMENT_H
#define ONIONSKIN_VOLUME_SEGMENT_H

#include <pthread.h>
#include <stdint.h>

#include "base/epoch.h"
#include "base/store_file.h"
#include "layer/map_log.h"

struct onion_mapping {
    char *address;
    uint64_t length;
    int fd; /* a base's descriptor, to find its holes; a segment's mapping has no descriptor */
};

struct onion_slots {
    uint32_t slot;
    uint32_t count;
};

struct onion_slots_list {
    struct onion_slots *items;
    size_t count, capacity;
};

/* A 2 MiB range that is being filled in order, and the slots that are set aside for it. */
struct onion_stream {
    uint64_t next_block;
    uint32_t next_slot;
    uint32_t left;
    uint64_t last_used;
};
#define ONION_STREAMS 8

struct onion_segment {
    uint32_t number;     /* in the index of this volume; used again when this segment is gone */
    uint64_t birth;      /* counts the segments of this opening; never used twice */
    uint32_t log_number; /* in the head's map log; 0: not yet declared there */
    uint64_t generation; /* the generation of the head that owns it; 0: a sealed layer owns it */
    int own;             /* 1: that head made it, so it is writable; 0: it was inherited */
    int reclaim_wanted;  /* slots became free, and no flush gives them back */
    unsigned char uuid[ONION_UUID_BYTES];
    char *path;
    const struct onion_store *store; /* of the volume; NULL: of no volume */
    uint32_t block_shift;
    uint64_t features;   /* the features for the header, when the file is made */
    int fd;              /* open for writing, or -1 */
    int created;         /* the file exists */
    int directory_dirty; /* made since the last sync of the directory */
    int dirty;           /* written since the last sync */
    uint32_t next_slot;  /* slots from here on were never handed out */
    struct onion_mapping *mapping;
    pthread_mutex_t mapping_lock;
    struct onion_slots_list free_slots;
    struct onion_stream streams[ONION_STREAMS];
    uint64_t stream_clock;
};

static inline uint64_t onion_slot_offset(uint32_t block_shift, uint64_t slot) {
    return ONION_HEADER_BYTES + (slot << block_shift);
}

/* Allocates the description of the segment `uuid` in `directory`, and opens nothing. -ENOMEM. `store` is the store of that
 * directory, and stays valid as long as the segment. */
int onion_segment_new(const struct onion_store *store, const char *directory, const unsigned char *uuid,
                      uint32_t number, uint32_t block_shift, struct onion_segment **out);
/* Gives a segment that was not opened yet another id. */
void onion_segment_rename(struct onion_segment *segment, const unsigned char *uuid);
/* Closes and unmaps. No thread may be reading. NULL is allowed. */
void onion_segment_free(struct onion_segment *segment);

/* Checks header and length of a segment that has `slots` slots and is only read from now on. 0, -errno (-ENOENT: it
 * is missing), or ONION_E_*. */
int onion_segment_check(struct onion_segment *segment, uint64_t slots);
/* Opens a segment that this head made for writing, if the file exists. slots_named: the highest slot + 1 that the map
 * names. If it is 0, a file that is missing or torn is new, because nothing in it was promised. */
int onion_segment_open_own(struct onion_segment *segment, uint64_t slots_named);
/* Does the same for a segment that is only read: it changes nothing, and keeps no descriptor. */
int onion_segment_check_own(struct onion_segment *segment, uint64_t slots_named);
/* Makes the file (O_EXCL) and writes its header. The segment's directory has to be synced later. */
int onion_segment_create(struct onion_segment *segment);

/* Returns the number of whole slots in the file. It is lower than the number of slots handed out if slots were set
 * aside and never written. */
uint64_t onion_segment_slots_in_file(const struct onion_segment *segment);

/* Finds the address of `count` slots from `slot` on. The segment is mapped now if it is not yet. Old mappings are
 * retired to `epoch`. */
int onion_segment_address(struct onion_segment *segment, struct onion_epoch *epoch, uint32_t slot, uint64_t count,
                          const char **address);

/* Hands out up to `count` consecutive slots for blocks from block_index on: sets *slot, and returns how many (>= 1), or
 * ONION_E_FULL_SEGMENT. blocks_per_range is the number of blocks in 2 MiB. A write to a range's first block sets slots
 * aside for the whole range. */
int64_t onion_segment_take(struct onion_segment *segment, uint64_t block_index, uint64_t count,
                           uint32_t blocks_per_range, uint32_t *slot);
/* Lets slots be handed out again. -ENOMEM: they stay unused until the volume is opened again. */
int onion_segment_give_back(struct onion_segment *segment, uint32_t slot, uint32_t count);

#endif
