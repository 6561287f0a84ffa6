/* resize.c: changes the size of a volume. See volume.h for what must hold. */
#include <errno.h>
#include <stdlib.h>

#include "volume/internal.h"

/* Zeroes the part past `size_bytes` of the block in which that size ends. It does this in a new slot, because the old
 * slot must stay as it is until the new size is durable. The caller keeps writers out. */
static int zero_tail(struct onion_volume *volume, uint64_t size_bytes) {
    uint32_t tail = (uint32_t)(size_bytes & (volume->block_size - 1));
    if (!tail)
        return 0;
    uint64_t block = size_bytes >> volume->block_shift;
    onion_location location = onion_map_lookup(&volume->index, block);
    if (location == ONION_LOCATION_ZERO || (location == ONION_LOCATION_HOLE && !volume->base))
        return 0;
    char *zeros = calloc(1, volume->block_size);
    if (!zeros)
        return -ENOMEM;
    int status = onion_volume_write_part(volume, block, tail, volume->block_size - tail, zeros, 1);
    free(zeros);
    return status;
}

/* Makes blocks in [first, end) read zero when the volume grows over them again, whatever lies below. */
static int hide_blocks(struct onion_volume *volume, uint64_t first, uint64_t end) {
    onion_location location = volume->nothing_below ? ONION_LOCATION_HOLE : ONION_LOCATION_ZERO;
    int status = 0;
    while (first < end && status == 0) {
        uint64_t range_end = (first / volume->blocks_per_range + 1) * volume->blocks_per_range;
        uint64_t count = (range_end < end ? range_end : end) - first;
        status = onion_volume_change(volume, first, count, location);
        first += count;
    }
    return status;
}

static int apply_resize(struct onion_volume *volume, uint64_t size_bytes) {
    uint64_t mask = volume->block_size - 1, old = volume->size_bytes;
    uint64_t small = size_bytes < old ? size_bytes : old, large = size_bytes < old ? old : size_bytes;
    int status = onion_volume_grow_index(volume, large);
    if (status == 0)
        status = zero_tail(volume, small);
    if (status == 0)
        status = hide_blocks(volume, (small + mask) >> volume->block_shift, (large + mask) >> volume->block_shift);
    struct onion_record record = {.kind = ONION_RECORD_SIZE, .block_index = size_bytes};
    if (status == 0) {
        pthread_mutex_lock(&volume->dirty_lock);
        status = onion_dirty_records_make_room(volume);
        if (status == 0)
            status = onion_dirty_records_put(volume, &record);
        pthread_mutex_unlock(&volume->dirty_lock);
    }
    if (status == 0)
        __atomic_store_n(&volume->size_bytes, size_bytes, __ATOMIC_RELEASE);
    return status;
}

/* Keeps the records of a resize from being published. A resize happens as a whole or not at all, even for an opening
 * that finds the journal: if the frame was not written, its records are gone. */
static int hold_records(struct onion_volume *volume) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    pthread_mutex_lock(&volume->dirty_lock);
    int status = onion_dirty_records_make_room(volume);
    dirty->is_held = status == 0;
    dirty->join_from = dirty->record_count;
    status = status == ONION_E_JOURNAL_FULL ? onion_dirty_records_note_fault(volume, -ENOSPC) : status;
    pthread_mutex_unlock(&volume->dirty_lock);
    return status;
}

int onion_volume_resize(struct onion_volume *volume, uint64_t size_bytes) {
    if (size_bytes > ONION_VOLUME_BYTES_MAX)
        return -EFBIG;
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = onion_volume_flush_behind_gate(volume);
    if (status == 0) {
        pthread_rwlock_wrlock(&volume->gate);
        if (size_bytes == volume->size_bytes || (status = hold_records(volume)) < 0) {
            pthread_rwlock_unlock(&volume->gate);
            onion_volume_open_flush_gate(volume);
            return status;
        }
        status = apply_resize(volume, size_bytes);
        /* One frame holds the size and the hidden blocks. The gate is held, so no writer adds to it or sees it
         * undone. */
        struct onion_dirty_records batch = onion_volume_take_dirty_records(volume, NULL);
        if (status == 0)
            status = onion_volume_commit_batch(volume, &volume->log, &batch, 0);
        else
            onion_volume_put_back(volume, &batch);
        /* A resize that is half done in memory cannot be undone. Nothing of it is durable, so the volume is poisoned,
         * and opening it again shows the old size. */
        if (status < 0)
            onion_volume_mark_poisoned(volume);
        pthread_rwlock_unlock(&volume->gate);
    }
    onion_volume_open_flush_gate(volume);
    return status;
}
