/* free_slots.c: finds the slots of a segment that are still needed, and gives the others back when a head is opened.
 * See volume.h for what must hold. */
#include <errno.h>
#include <stdlib.h>

#include "volume/internal.h"

static void mark_slots(unsigned char *bitmap, uint64_t bits, uint64_t slot, uint64_t count) {
    for (uint64_t i = slot; i < slot + count && i < bits; i++)
        bitmap[i >> 3] |= (unsigned char)(1u << (i & 7));
}

/* Makes a bitmap of the slots of `segment` that the index, or a change that is not durable yet, needs. The caller keeps
 * writers out. */
static unsigned char *live_bitmap(struct onion_volume *volume, const struct onion_segment *segment, uint64_t *bits) {
    *bits = segment->next_slot;
    unsigned char *bitmap = calloc(*bits / 8 + 1, 1);
    if (!bitmap)
        return NULL;
    uint64_t at = 0;
    struct onion_run run;
    while (onion_map_next(&volume->index, at, volume->index.block_count, &run)) {
        if (onion_location_is_data(run.location) && onion_location_segment(run.location) == segment->number)
            mark_slots(bitmap, *bits, onion_location_slot(run.location), run.block_count);
        at = run.block_index + run.block_count;
    }
    pthread_mutex_lock(&volume->dirty_lock);
    for (size_t i = 0; i < volume->dirty_records.freed_count; i++)
        if (volume->dirty_records.freed[i].segment == segment->number)
            mark_slots(bitmap, *bits, volume->dirty_records.freed[i].slot, volume->dirty_records.freed[i].count);
    pthread_mutex_unlock(&volume->dirty_lock);
    return bitmap;
}

/* After a seal, the index is the next head's. It forgets blocks that the next head overwrites, although the sealed
 * layer still has them. So the segment is looked up only after the flush, which waits for a seal to end.
 *
 * The flush comes first for another reason too. A change that was made while a seal or a rewrite waited for its outcome
 * did not note the slot that it freed. So neither the index nor the dirty records may show that the durable map still
 * needs this slot. */
int onion_volume_live_slots(struct onion_volume *volume, const unsigned char *uuid, unsigned char **bitmap,
                            uint64_t *bits) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = onion_volume_flush_behind_gate(volume);
    pthread_rwlock_wrlock(&volume->gate);
    uint32_t number = status == 0 ? onion_volume_find_segment(volume, uuid) : 0;
    if (status == 0 && !number)
        status = -ENOENT;
    if (status == 0 && !(*bitmap = live_bitmap(volume, volume->segments[number], bits)))
        status = -ENOMEM;
    pthread_rwlock_unlock(&volume->gate);
    onion_volume_open_flush_gate(volume);
    return status;
}

static int give_back_unset(struct onion_volume *volume, struct onion_segment *segment, const unsigned char *bitmap,
                           uint64_t bits) {
    struct onion_freed *runs = NULL;
    size_t count = 0, capacity = 0;
    for (uint64_t i = 0; i < bits; i++) {
        if (bitmap[i >> 3] >> (i & 7) & 1)
            continue;
        if (count && runs[count - 1].slot + runs[count - 1].count == i) {
            runs[count - 1].count++;
            continue;
        }
        if (count == capacity) {
            struct onion_freed *more = realloc(runs, (capacity = capacity * 2 + 64) * sizeof *runs);
            if (!more) {
                free(runs);
                return -ENOMEM;
            }
            runs = more;
        }
        runs[count++] = (struct onion_freed){segment->number, (uint32_t)i, 1};
    }
    int status = count ? onion_volume_reclaim(volume, segment, runs, count) : 0;
    free(runs);
    return status;
}

/* Flushes the dirty records that a process left when it died. If the disk is full, they stay dirty. */
static int flush_found(struct onion_volume *volume) {
    return volume->dirty_records.record_count ? onion_volume_flush(volume) : 0;
}

int onion_volume_free_own_slots(struct onion_volume *volume) {
    int status = flush_found(volume);
    if (onion_has_no_room(status)) {
        /* A later opening that has room looks for free slots. The volume can be used, so that space can be freed. */
        onion_site_clear(); /* this error is not reported */
        return 0;
    }
    for (uint32_t i = 1; i <= volume->segment_count && status == 0; i++) {
        struct onion_segment *segment = volume->segments[i];
        if (!segment->own || !segment->created || !segment->next_slot) /* it has no slots */
            continue;
        unsigned char *bitmap;
        uint64_t bits;
        status = onion_volume_live_slots(volume, segment->uuid, &bitmap, &bits);
        if (status < 0)
            break;
        status = give_back_unset(volume, segment, bitmap, bits);
        free(bitmap);
    }
    return status;
}
