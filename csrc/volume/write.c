/* write.c: writes, zeroes and trims a volume. Bytes are written to slots first, then the map changes. See volume.h for
 * what must hold. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "volume/internal.h"

#define WRITE_BATCH 256  /* the most blocks of write_blocks that share one pwrite */
#define ROOM_ATTEMPTS 64 /* flushes to make room for one change; other writers may take the room each time */

/* ---- changing the map ---- */

int onion_dirty_records_make_room(struct onion_volume *volume) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    if (__builtin_expect(dirty->record_count + 2 <= dirty->record_capacity, 1))
        return 0;
    if (volume->journal.path) {
        int status = onion_journal_make_room(volume);
        if (status < 0 || dirty->published)
            return status;
    }
    size_t capacity = dirty->record_capacity * 2 + 256;
    struct onion_record *records = realloc(dirty->records, capacity * sizeof *records);
    if (!records)
        return -ENOMEM;
    dirty->records = records;
    dirty->record_capacity = capacity;
    return 0;
}

static int reserve_freed(struct onion_dirty_records *dirty, size_t more) {
    if (dirty->freed_count + more <= dirty->freed_capacity)
        return 0;
    size_t capacity = dirty->freed_capacity * 2 + more + 64;
    struct onion_freed *freed = realloc(dirty->freed, capacity * sizeof *freed);
    if (!freed)
        return -ENOMEM;
    dirty->freed = freed;
    dirty->freed_capacity = capacity;
    return 0;
}

/* Notes the slots that the head holds for these blocks. They are counted as freed only when the index has changed. */
static int64_t note_freed(struct onion_volume *volume, uint64_t block_index, uint64_t block_count) {
    size_t noted = 0;
    uint64_t at = block_index, end = block_index + block_count;
    struct onion_run run;
    while (at < end && onion_map_next(&volume->index, at, end, &run)) {
        at = run.block_index + run.block_count;
        if (!onion_location_is_data(run.location) ||
            !onion_segment_is_head(volume, volume->segments[onion_location_segment(run.location)]))
            continue;
        if (reserve_freed(&volume->dirty_records, noted + 1) < 0)
            return -ENOMEM;
        volume->dirty_records.freed[volume->dirty_records.freed_count + noted++] = (struct onion_freed){
            onion_location_segment(run.location), onion_location_slot(run.location), (uint32_t)run.block_count};
    }
    return (int64_t)noted;
}

static struct onion_record record_of(uint64_t block_index, uint64_t block_count, onion_location location) {
    struct onion_record record = {.block_index = block_index, .block_count = (uint32_t)block_count};
    if (onion_location_is_data(location)) {
        record.kind = ONION_RECORD_DATA;
        record.segment = (uint16_t)onion_location_segment(location);
        record.slot = onion_location_slot(location);
    } else {
        record.kind = location == ONION_LOCATION_HOLE ? ONION_RECORD_HOLE : ONION_RECORD_ZERO;
    }
    return record;
}

static void count_freed(struct onion_volume *volume, size_t noted) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    for (size_t i = 0; i < noted; i++)
        dirty->freed_slots += dirty->freed[dirty->freed_count + i].count;
    dirty->freed_count += noted;
    if (dirty->record_count > dirty->flush_at_records + ONION_WAITING_RECORDS_MAX ||
        dirty->freed_slots > dirty->flush_at_slots + (ONION_WAITING_BYTES_MAX >> volume->block_shift))
        __atomic_store_n(&volume->flush_wanted, 1, __ATOMIC_RELAXED);
}

int onion_volume_change(struct onion_volume *volume, uint64_t block_index, uint64_t block_count,
                        onion_location location) {
    struct onion_record record = record_of(block_index, block_count, location);
    struct onion_dirty_records *dirty = &volume->dirty_records;
    pthread_mutex_lock(&volume->dirty_lock);
    int64_t noted = onion_dirty_records_make_room(volume);
    if (noted == 0)
        noted = note_freed(volume, block_index, block_count);
    struct onion_dirty_records_mark mark = onion_dirty_records_mark(dirty);
    /* The record comes first: if its page fails, nothing has changed. */
    int status = noted < 0 ? (int)noted : onion_dirty_records_put(volume, &record);
    if (status == 0) {
        status = onion_map_set(&volume->index, block_index, block_count, location);
        if (status < 0)
            onion_dirty_records_take_back(dirty, &mark);
        else
            count_freed(volume, (size_t)noted);
    }
    pthread_mutex_unlock(&volume->dirty_lock);
    return status;
}

/* ---- writing ---- */

/* Flushes if too much waits for a flush. Called after a write has released its locks. */
static int after_write(struct onion_volume *volume, int status) {
    if (__builtin_expect(__atomic_load_n(&volume->flush_wanted, __ATOMIC_RELAXED), 0) && status == 0)
        return onion_volume_relieve(volume);
    return status;
}

static int begin_write(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    int status = onion_volume_usable(volume);
    if (status < 0) /* in the child of a fork the gate may be held for ever */
        return status;
    pthread_rwlock_rdlock(&volume->gate);
    status = onion_volume_usable(volume);
    if (status == 0 && !volume->own) /* the volume is a view, or its head was not opened */
        status = ONION_E_READ_ONLY;
    if (status == 0 && !onion_volume_in_bounds(volume, offset, length))
        status = ONION_E_BOUNDS;
    if (status < 0)
        pthread_rwlock_unlock(&volume->gate);
    return status;
}

static int no_room_in_journal(struct onion_volume *volume) {
    pthread_mutex_lock(&volume->dirty_lock);
    int status = onion_dirty_records_note_fault(volume, -ENOSPC);
    pthread_mutex_unlock(&volume->dirty_lock);
    return status;
}

/* Flushes to make room for the record of a change. The gate is released meanwhile, and is not taken again after an
 * error. */
static int flush_for_room(struct onion_volume *volume, uint64_t offset, uint64_t length, uint32_t *attempts) {
    pthread_rwlock_unlock(&volume->gate);
    int status = (*attempts)++ < ROOM_ATTEMPTS ? onion_volume_flush(volume) : no_room_in_journal(volume);
    return status < 0 ? status : begin_write(volume, offset, length);
}

static pthread_mutex_t *stripe_of(struct onion_volume *volume, uint64_t block_index) {
    return &volume->stripes[onion_map_range_of(&volume->index, block_index) % ONION_STRIPES];
}

/* Takes slots for new blocks in the head's segment, whose file is made now if these are its first blocks. */
static int64_t take_slots(struct onion_volume *volume, uint64_t block_index, uint64_t count, uint32_t *slot,
                          struct onion_segment **out) {
    pthread_mutex_lock(&volume->slots_lock);
    struct onion_segment *segment = *out = volume->segments[volume->own];
    int64_t taken = segment->created ? 0 : onion_segment_create(segment);
    if (taken == 0)
        taken = onion_segment_take(segment, block_index, count, volume->blocks_per_range, slot);
    pthread_mutex_unlock(&volume->slots_lock);
    return taken == ONION_E_FULL_SEGMENT ? onion_site_set(ONION_E_FULL_SEGMENT, segment->path, 0) : taken;
}

/* Returns the slots of a write that failed. They may hold some of its bytes. The next opening wipes them, or a reclaim
 * does if the segment is sealed before that. */
static void return_slots(struct onion_volume *volume, struct onion_segment *segment, uint32_t slot, uint32_t count) {
    onion_volume_want_reclaim(volume, segment);
    pthread_mutex_lock(&volume->slots_lock);
    onion_segment_give_back(segment, slot, count);
    pthread_mutex_unlock(&volume->slots_lock);
}

static __attribute__((noinline, cold)) int write_fault(int status, const struct onion_segment *segment, uint32_t slot) {
    return onion_site_set(status, segment->path, onion_slot_offset(segment->block_shift, slot));
}

static int write_slots(struct onion_segment *segment, uint32_t slot, uint64_t start, uint64_t length,
                       const void *bytes) {
    int status = onion_pwrite_all(segment->fd, bytes, length, onion_slot_offset(segment->block_shift, slot) + start);
    __atomic_store_n(&segment->dirty, 1, __ATOMIC_SEQ_CST);
    return __builtin_expect(status < 0, 0) ? write_fault(status, segment, slot) : status;
}

/* Writes whole blocks to new slots and maps them. */
static int write_fresh(struct onion_volume *volume, uint64_t block_index, uint64_t count, const char *bytes) {
    while (count) {
        struct onion_segment *segment;
        uint32_t slot;
        int64_t taken = take_slots(volume, block_index, count, &slot, &segment);
        if (taken < 0)
            return (int)taken;
        int status = write_slots(segment, slot, 0, (uint64_t)taken << volume->block_shift, bytes);
        if (status == 0)
            status =
                onion_volume_change(volume, block_index, (uint64_t)taken, onion_location_make(segment->number, slot));
        if (status < 0) {
            return_slots(volume, segment, slot, (uint32_t)taken);
            return status;
        }
        block_index += (uint64_t)taken;
        bytes += (uint64_t)taken << volume->block_shift;
        count -= (uint64_t)taken;
    }
    return 0;
}

/* Writes whole blocks of one 2 MiB range: in place if the head holds them, otherwise in new slots. */
static int write_whole(struct onion_volume *volume, uint64_t block_index, uint64_t count, const char *bytes) {
    while (count) {
        struct onion_run run;
        onion_map_run_at(&volume->index, block_index, count, &run);
        int own = onion_location_is_own(volume, run.location), status;
        if (own) {
            status = write_slots(volume->segments[onion_location_segment(run.location)],
                                 onion_location_slot(run.location), 0, run.block_count << volume->block_shift, bytes);
        } else {
            /* The next blocks that need new slots too share one write with it. */
            struct onion_run next;
            while (run.block_count < count) {
                onion_map_run_at(&volume->index, block_index + run.block_count, count - run.block_count, &next);
                if (onion_location_is_own(volume, next.location))
                    break;
                run.block_count += next.block_count;
            }
            status = write_fresh(volume, block_index, run.block_count, bytes);
        }
        if (status < 0)
            return status;
        block_index += run.block_count;
        bytes += run.block_count << volume->block_shift;
        count -= run.block_count;
    }
    return 0;
}

int onion_volume_write_part(struct onion_volume *volume, uint64_t block_index, uint32_t start, uint32_t length,
                            const void *bytes, int fresh) {
    struct onion_run run;
    onion_map_run_at(&volume->index, block_index, 1, &run);
    if (!fresh && onion_location_is_own(volume, run.location))
        return write_slots(volume->segments[onion_location_segment(run.location)], onion_location_slot(run.location),
                           start, length, bytes);
    char *block = malloc(volume->block_size);
    if (!block)
        return -ENOMEM;
    int status = onion_volume_read_unbounded(volume, block_index << volume->block_shift, volume->block_size, block);
    if (status == 0) {
        memcpy(block + start, bytes, length);
        status = write_fresh(volume, block_index, 1, block);
    }
    free(block);
    return status;
}

/* Writes inside one 2 MiB range, whose stripe the caller holds. */
static int write_in_range(struct onion_volume *volume, uint64_t offset, uint64_t length, const char *bytes) {
    uint32_t shift = volume->block_shift, mask = volume->block_size - 1;
    int status = 0;
    if (offset & mask) {
        uint32_t start = (uint32_t)(offset & mask);
        uint32_t part = volume->block_size - start < length ? volume->block_size - start : (uint32_t)length;
        status = onion_volume_write_part(volume, offset >> shift, start, part, bytes, 0);
        offset += part, bytes += part, length -= part;
    }
    uint64_t whole = length >> shift;
    if (status == 0 && whole)
        status = write_whole(volume, offset >> shift, whole, bytes);
    offset += whole << shift, bytes += whole << shift, length -= whole << shift;
    if (status == 0 && length)
        status = onion_volume_write_part(volume, offset >> shift, 0, (uint32_t)length, bytes, 0);
    return status;
}

static uint64_t until_range_end(uint64_t offset, uint64_t length) {
    uint64_t left = (1ull << ONION_RANGE_BYTES_SHIFT) - (offset & ((1ull << ONION_RANGE_BYTES_SHIFT) - 1));
    return left < length ? left : length;
}

/* ---- zero and trim ---- */

/* It is never written, and not const so that it takes no room in the library's file. */
static char zeros[1 << ONION_BLOCK_SHIFT_MAX];

/* Makes a part of a block zero. It does nothing if the whole block reads zero. */
static int zero_part(struct onion_volume *volume, uint64_t block_index, uint32_t start, uint32_t length) {
    onion_location location = onion_map_lookup(&volume->index, block_index);
    int reads_zero = location == ONION_LOCATION_ZERO || (location == ONION_LOCATION_HOLE && !volume->base);
    return reads_zero ? 0 : onion_volume_write_part(volume, block_index, start, length, zeros, 0);
}

static int zero_whole(struct onion_volume *volume, uint64_t block_index, uint64_t count) {
    onion_location wanted = volume->nothing_below ? ONION_LOCATION_HOLE : ONION_LOCATION_ZERO;
    while (count) {
        struct onion_run run;
        onion_map_run_at(&volume->index, block_index, count, &run);
        int status = run.location == wanted ? 0 : onion_volume_change(volume, block_index, run.block_count, wanted);
        if (status < 0)
            return status;
        block_index += run.block_count;
        count -= run.block_count;
    }
    return 0;
}

static int zero_in_range(struct onion_volume *volume, uint64_t offset, uint64_t length, int to_the_end) {
    uint32_t shift = volume->block_shift, mask = volume->block_size - 1;
    int status = 0;
    if (offset & mask) {
        uint32_t start = (uint32_t)(offset & mask);
        uint32_t part = volume->block_size - start < length ? volume->block_size - start : (uint32_t)length;
        status = zero_part(volume, offset >> shift, start, part);
        offset += part, length -= part;
    }
    /* If the range goes to the volume's end, the last block counts as whole. */
    uint64_t whole = to_the_end ? (length + mask) >> shift : length >> shift;
    if (status == 0 && whole)
        status = zero_whole(volume, offset >> shift, whole);
    if (status == 0 && length > whole << shift)
        status = zero_part(volume, (offset >> shift) + whole, 0, (uint32_t)(length - (whole << shift)));
    return status;
}

/* ---- range by range ---- */

/* Writes `bytes`, or zeros if it is NULL. Each 2 MiB range is changed under its stripe. */
static int write_or_zero(struct onion_volume *volume, uint64_t offset, uint64_t length, const char *bytes) {
    int status = begin_write(volume, offset, length);
    if (status < 0)
        return status;
    uint32_t attempts = 0;
    while (length && status == 0) {
        uint64_t part = until_range_end(offset, length);
        pthread_mutex_t *stripe = stripe_of(volume, offset >> volume->block_shift);
        pthread_mutex_lock(stripe);
        status = bytes ? write_in_range(volume, offset, part, bytes)
                       : zero_in_range(volume, offset, part, offset + part == onion_volume_size(volume));
        pthread_mutex_unlock(stripe);
        if (status == ONION_E_JOURNAL_FULL) {
            status = flush_for_room(volume, offset, length, &attempts);
            if (status < 0)
                return status;
            continue;
        }
        offset += part, length -= part, attempts = 0;
        bytes = bytes ? bytes + part : NULL;
    }
    pthread_rwlock_unlock(&volume->gate);
    return after_write(volume, status);
}

int onion_volume_write(struct onion_volume *volume, uint64_t offset, uint64_t length, const void *bytes) {
    return write_or_zero(volume, offset, length, bytes);
}

int onion_volume_zero(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    return write_or_zero(volume, offset, length, NULL);
}

/* ---- many blocks at once ---- */

/* Writes one block of a batch: in place if the head holds it. */
static int write_listed(struct onion_volume *volume, uint64_t block_index, const char *bytes, uint64_t length) {
    pthread_mutex_t *stripe = stripe_of(volume, block_index);
    pthread_mutex_lock(stripe);
    int status = length == volume->block_size
                     ? write_whole(volume, block_index, 1, bytes)
                     : onion_volume_write_part(volume, block_index, 0, (uint32_t)length, bytes, 0);
    pthread_mutex_unlock(stripe);
    return status;
}

/* Writes blocks that need new slots. They get consecutive slots, wherever they are on the disk, and share one write. No
 * other thread uses these slots until they are mapped, so the write needs no stripe. */
static int write_listed_fresh(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count,
                              const char *bytes) {
    while (count) {
        struct onion_segment *segment;
        uint32_t slot;
        int64_t taken = take_slots(volume, count == 1 ? block_indices[0] : UINT64_MAX, count, &slot, &segment);
        if (taken < 0)
            return (int)taken;
        int status = write_slots(segment, slot, 0, (uint64_t)taken << volume->block_shift, bytes);
        for (int64_t i = 0; i < taken; i++) {
            if (status == 0) {
                pthread_mutex_t *stripe = stripe_of(volume, block_indices[i]);
                pthread_mutex_lock(stripe);
                status = onion_volume_change(volume, block_indices[i], 1,
                                             onion_location_make(segment->number, slot + (uint32_t)i));
                pthread_mutex_unlock(stripe);
            }
            if (status < 0)
                return_slots(volume, segment, slot + (uint32_t)i, 1);
        }
        if (status < 0)
            return status;
        block_indices += taken;
        bytes += (uint64_t)taken << volume->block_shift;
        count -= (uint64_t)taken;
    }
    return 0;
}

/* Returns how many of the next blocks are whole and not held by the head yet. This is only a guess, because other
 * writers are at work. They may also replace the leaf that is read here, so it takes a reader's ticket. */
static uint64_t count_fresh(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count,
                            uint64_t whole_blocks) {
    uint64_t fresh = 0;
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    while (fresh < count && fresh < WRITE_BATCH && block_indices[fresh] < whole_blocks &&
           !onion_location_is_own(volume, onion_map_lookup(&volume->index, block_indices[fresh])))
        fresh++;
    onion_epoch_leave(&volume->epoch, ticket);
    return fresh;
}

int onion_volume_write_blocks(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count,
                              const void *bytes) {
    int status = begin_write(volume, 0, 0);
    if (status < 0)
        return status;
    if (!onion_volume_has_blocks(volume, block_indices, count))
        status = ONION_E_BOUNDS;
    const char *from = bytes;
    uint32_t attempts = 0;
    for (uint64_t i = 0; i < count && status == 0;) {
        uint64_t size = onion_volume_size(volume), done = 1, start = block_indices[i] << volume->block_shift;
        uint64_t fresh = count_fresh(volume, block_indices + i, count - i, size >> volume->block_shift);
        if (fresh) {
            status = write_listed_fresh(volume, block_indices + i, fresh, from + (i << volume->block_shift));
            done = fresh;
        } else {
            uint64_t length = size - start < volume->block_size ? size - start : volume->block_size;
            status = write_listed(volume, block_indices[i], from + (i << volume->block_shift), length);
        }
        if (status == ONION_E_JOURNAL_FULL) { /* blocks written so far are the head's, and are written again in place */
            status = flush_for_room(volume, 0, 0, &attempts);
            if (status < 0)
                return status;
            if (!onion_volume_has_blocks(volume, block_indices + i, count - i))
                status = ONION_E_BOUNDS;
            continue;
        }
        i += done, attempts = 0;
    }
    pthread_rwlock_unlock(&volume->gate);
    return after_write(volume, status);
}
