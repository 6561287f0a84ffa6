/* reclaim.c: gives slots back that are not needed any more: it wipes them (policy `zero`), punches them, and lets them
 * be used again. See segment.h for what must hold. */
#include <errno.h>
#include <stdlib.h>

#include "bulk/wipe.h"
#include "volume/internal.h"

static int by_segment_and_slot(const void *a, const void *b) {
    const struct onion_freed *x = a, *y = b;
    if (x->segment != y->segment)
        return x->segment < y->segment ? -1 : 1;
    return x->slot < y->slot ? -1 : x->slot > y->slot;
}

/* Sorts the runs of slots and joins neighbours in place. Returns how many are left. */
static size_t join_freed(struct onion_freed *freed, size_t count) {
    size_t kept = 0;
    qsort(freed, count, sizeof *freed, by_segment_and_slot);
    for (size_t i = 0; i < count; i++) {
        struct onion_freed *last = kept ? &freed[kept - 1] : NULL;
        if (last && last->segment == freed[i].segment && last->slot + last->count == freed[i].slot)
            last->count += freed[i].count;
        else
            freed[kept++] = freed[i];
    }
    return kept;
}

int onion_volume_reclaim(struct onion_volume *volume, struct onion_segment *segment, const struct onion_freed *freed,
                         size_t count) {
    struct onion_byte_range *ranges = malloc(count * sizeof *ranges);
    struct onion_wipe_result result;
    if (!ranges)
        return -ENOMEM;
    for (size_t i = 0; i < count; i++) {
        ranges[i].offset = onion_slot_offset(volume->block_shift, freed[i].slot);
        ranges[i].length = (uint64_t)freed[i].count << volume->block_shift;
    }
    int flags = ONION_WIPE_PUNCH | (volume->wipe_zero ? ONION_WIPE_ZERO : 0);
    int status = onion_wipe(segment->fd, ranges, count, flags, 1, &result, NULL, NULL);
    free(ranges);
    if (status == 0 && volume->wipe_zero)
        __atomic_add_fetch(&volume->bytes_unwipeable, result.bytes_unwipeable, __ATOMIC_RELAXED);
    if (result.sync_failed) /* it may have lost data of writers in this segment, and no other sync reports that */
        onion_volume_poison_on(volume, status);
    if (status < 0) {
        onion_volume_want_reclaim(volume, segment);
        return onion_site_set(status, segment->path, count ? onion_slot_offset(volume->block_shift, freed[0].slot) : 0);
    }
    pthread_mutex_lock(&volume->slots_lock);
    for (size_t i = count; i; i--)
        onion_segment_give_back(segment, freed[i - 1].slot, freed[i - 1].count);
    pthread_mutex_unlock(&volume->slots_lock);
    return 0;
}

int onion_volume_reclaim_freed(struct onion_volume *volume, struct onion_dirty_records *batch) {
    if (!batch->freed_count)
        return 0;
    onion_epoch_wait(&volume->epoch); /* a read may still be copying from a slot that it found before */
    size_t count = join_freed(batch->freed, batch->freed_count);
    int status = 0;
    for (size_t i = 0, end; i < count; i = end) {
        for (end = i; end < count && batch->freed[end].segment == batch->freed[i].segment; end++)
            ;
        struct onion_segment *segment = volume->segments[batch->freed[i].segment];
        int one = 0;
        if (segment->own)
            one = onion_volume_reclaim(volume, segment, batch->freed + i, end - i);
        else
            onion_volume_want_reclaim(volume, segment);
        status = status < 0 ? status : one;
    }
    return status;
}
