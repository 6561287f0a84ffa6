/* flush.c: makes changes durable. See volume.h for what must hold.
 *
 * A flush, step by step, and what a crash between two steps leaves:
 *   1. take the dirty records and the dirty flags     nothing happened
 *   2. make the map file, if there is none              an empty log, or a torn header
 *   3. sync the segments (and their directory, if new)  data in slots that no durable map names
 *   4. sync the header of a new map, and its directory  an empty log
 *   5. append one frame to the map log                  a torn frame, which the next open cuts off
 *   6. sync the map log                                 the flush is done
 *   7. wipe and punch the slots that the frame freed    done again at the next open, or by the next reclaim
 * The flush gate lets one flush run at a time, so at most one frame is unsynced. A flush never relies on the sync of
 * another: it waits and then makes its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "volume/internal.h"

#define NET_RECORDS_MIN 1024u /* a batch with so many records is reduced to its net changes before it is written */

/* ---- segments ---- */

/* Syncs the dirty segments of the head. With of_sealed, it syncs only those of the head that was just sealed, because
 * the batch holds no changes of the next head. */
static int sync_segments(struct onion_volume *volume, int of_sealed) {
    uint32_t count = __atomic_load_n(&volume->segment_count, __ATOMIC_ACQUIRE);
    int directory_dirty = 0;
    for (uint32_t i = 1; i <= count; i++) {
        struct onion_segment *segment = volume->segments[i];
        if (!segment->own || (of_sealed && onion_segment_is_head(volume, segment)))
            continue;
        if (!__atomic_exchange_n(&segment->dirty, 0, __ATOMIC_SEQ_CST))
            continue;
        int status = onion_sync_file(segment->fd); /* BARRIER: segment data */
        if (status < 0)
            return onion_volume_poison_on(volume, onion_site_set(status, segment->path, 0));
        directory_dirty |= __atomic_exchange_n(&segment->directory_dirty, 0, __ATOMIC_SEQ_CST);
    }
    return directory_dirty ? onion_volume_sync_segment_names(volume) : 0;
}

/* ---- the frame ---- */

/* Replaces the index numbers of segments in the records by the numbers of this log. A segment that the log has not
 * named yet gets a number, and a SEGMENT record is put before the record. `out` has room for the records and one
 * SEGMENT record for each own segment. If the frame is not written, the caller takes the new numbers back. */
static uint32_t number_records(struct onion_volume *volume, const struct onion_head_log *log,
                               const struct onion_record *records, size_t count, struct onion_record *out,
                               uint32_t *new_segments, uint32_t *new_count) {
    uint32_t used = 0;
    *new_count = 0;
    for (size_t i = 0; i < count; i++) {
        struct onion_record record = records[i];
        if (record.kind == ONION_RECORD_SEGMENT) /* it has the number of the index, and is for the journal only */
            continue;
        if (record.kind == ONION_RECORD_DATA) {
            struct onion_segment *segment = volume->segments[record.segment];
            if (!segment->log_number) {
                segment->log_number = log->numbers_given + ++*new_count;
                new_segments[*new_count - 1] = segment->number;
                out[used++] = onion_record_segment((uint16_t)segment->log_number, segment->uuid);
            }
            record.segment = (uint16_t)segment->log_number;
        }
        out[used++] = record;
    }
    return used;
}

/* Copies the records of a batch out of the journal's half in which they lie. The half could be moved without
 * dirty_lock. */
static int copy_batch(struct onion_volume *volume, const struct onion_dirty_records *batch, struct onion_record *out) {
    pthread_mutex_lock(&volume->dirty_lock);
    const struct onion_journal *journal = &volume->journal;
    const struct onion_record *from = batch->published ? journal->records[!journal->current] : batch->records;
    int status = onion_journal_copy(out, from, batch->record_count);
    if (status < 0 && batch->published)
        onion_dirty_records_note_fault(volume, status);
    pthread_mutex_unlock(&volume->dirty_lock);
    return status;
}

/* Reduces many records to their net changes. So the length of a frame depends on how fragmented the changes are, and
 * not on how often blocks were written and trimmed. Returns the number of records, which stays the same if nothing is
 * gained or memory is missing. */
static size_t net_records(struct onion_volume *volume, struct onion_record *records, size_t count) {
    struct onion_map net = {0};
    uint64_t end = 1, at = 0;
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t last = records[i].block_index + records[i].block_count;
        if (records[i].kind == ONION_RECORD_SIZE)
            return count;
        if (records[i].kind != ONION_RECORD_SEGMENT && last > end)
            end = last;
    }
    struct onion_record *out = malloc(count * sizeof *out);
    int status = onion_map_init(&net, end, volume->block_shift);
    for (size_t i = 0; i < count && status == 0; i++)
        if (records[i].kind != ONION_RECORD_SEGMENT)
            status = onion_map_set(&net, records[i].block_index, records[i].block_count,
                                   records[i].kind == ONION_RECORD_DATA
                                       ? onion_location_make(records[i].segment, records[i].slot)
                                       : ONION_LOCATION_ZERO);
    struct onion_run run;
    uint16_t zero = volume->nothing_below ? ONION_RECORD_HOLE : ONION_RECORD_ZERO;
    while (out && status == 0 && used < count && onion_map_next(&net, at, end, &run)) {
        uint64_t blocks = run.block_count < UINT32_MAX ? run.block_count : UINT32_MAX;
        int is_data = onion_location_is_data(run.location);
        out[used++] = (struct onion_record){.block_index = run.block_index,
                                            .block_count = (uint32_t)blocks,
                                            .kind = is_data ? ONION_RECORD_DATA : zero,
                                            .segment = is_data ? (uint16_t)onion_location_segment(run.location) : 0,
                                            .slot = is_data ? onion_location_slot(run.location) : 0};
        at = run.block_index + blocks;
    }
    int is_less = out && status == 0 && used < count;
    if (is_less)
        memcpy(records, out, used * sizeof *out);
    onion_map_destroy(&net);
    free(out);
    return is_less ? used : count;
}

static int write_batch(struct onion_volume *volume, struct onion_head_log *log,
                       const struct onion_dirty_records *batch) {
    uint32_t own = onion_volume_own_segment_count(volume) + 1, new_count = 0;
    struct onion_record *copied = malloc((batch->record_count + 1) * sizeof *copied);
    struct onion_record *records = malloc((batch->record_count + own) * sizeof *records);
    uint32_t *new_segments = malloc(own * sizeof *new_segments);
    int status = copied && records && new_segments ? onion_head_log_draw_salt(log) : -ENOMEM;
    if (status == 0)
        status = onion_volume_poison_on(volume, copy_batch(volume, batch, copied));
    if (status == 0 && log->is_new)
        status = onion_head_log_sync_new(volume, log);
    if (status == 0) {
        uint64_t before = log->cursor.offset;
        size_t net = batch->record_count < NET_RECORDS_MIN ? batch->record_count
                                                           : net_records(volume, copied, batch->record_count);
        uint32_t count = number_records(volume, log, copied, net, records, new_segments, &new_count);
        status = onion_head_log_append(log, records, count);
        if (status < 0) {
            for (uint32_t i = 0; i < new_count; i++)
                volume->segments[new_segments[i]]->log_number = 0;
            /* Cut off what a short write left, because it must not stand before the next frame. If that fails, the frame
             * may be there as a whole, which the journal must say. */
            log->room_end = before;
            (void)onion_volume_poison_on(volume, onion_truncate(log->fd, before));
        } else {
            log->numbers_given += new_count;
            onion_volume_note_log_bytes(volume, log);
            status = onion_sync_file(log->fd); /* BARRIER: map frame */
            onion_volume_poison_on(volume, onion_site_set(status, log->path, before));
        }
    }
    free(copied);
    free(records);
    free(new_segments);
    return status;
}

/* ---- taking the dirty records, and putting them back ---- */

struct onion_dirty_records onion_volume_take_dirty_records(struct onion_volume *volume,
                                                           const struct onion_head_log *next) {
    struct onion_journal_owner owner = onion_head_log_owner(&volume->log),
                               first = next ? onion_head_log_owner(next) : owner;
    pthread_mutex_lock(&volume->dirty_lock);
    struct onion_dirty_records *dirty = &volume->dirty_records, batch = *dirty;
    dirty->freed = NULL;
    dirty->freed_count = dirty->freed_capacity = 0;
    dirty->freed_slots = dirty->flush_at_slots = dirty->flush_at_records = 0;
    __atomic_store_n(&volume->flush_wanted, 0, __ATOMIC_RELAXED);
    onion_journal_take(volume, &batch, &first, next ? &owner : NULL);
    pthread_mutex_unlock(&volume->dirty_lock);
    return batch;
}

static void *joined_arrays(void *first, size_t first_count, const void *second, size_t second_count, size_t size) {
    void *both = realloc(first, (first_count + second_count + 1) * size);
    if (both && second_count)
        memcpy((char *)both + first_count * size, second, second_count * size);
    return both;
}

static int put_back_records(struct onion_volume *volume, struct onion_dirty_records *batch) {
    struct onion_dirty_records *later = &volume->dirty_records;
    if (batch->published)
        return onion_journal_put_back(volume, batch);
    volume->journal.heap_taken = 0;
    if (!batch->record_count)
        return 0;
    void *records =
        joined_arrays(batch->records, batch->record_count, later->records, later->record_count, sizeof *batch->records);
    if (!records)
        return -ENOMEM;
    free(later->records);
    later->records = records;
    later->record_count += batch->record_count;
    later->record_capacity = later->record_count;
    later->is_held = batch->is_held;
    batch->records = NULL;
    return 0;
}

static int put_back_freed(struct onion_volume *volume, struct onion_dirty_records *batch) {
    struct onion_dirty_records *later = &volume->dirty_records;
    void *freed =
        joined_arrays(batch->freed, batch->freed_count, later->freed, later->freed_count, sizeof *batch->freed);
    if (!freed)
        return -ENOMEM;
    free(later->freed);
    later->freed = freed;
    later->freed_count += batch->freed_count;
    later->freed_capacity = later->freed_count + 1;
    later->freed_slots += batch->freed_slots;
    batch->freed = NULL;
    return 0;
}

void onion_volume_release_batch(struct onion_dirty_records *batch) {
    if (!batch->published)
        free(batch->records);
    free(batch->freed);
}

void onion_volume_put_back(struct onion_volume *volume, struct onion_dirty_records *batch) {
    pthread_mutex_lock(&volume->dirty_lock);
    int status = put_back_records(volume, batch);
    if (status == 0)
        status = put_back_freed(volume, batch);
    if (status < 0)
        onion_volume_mark_poisoned(volume); /* the order of the changes is lost */
    pthread_mutex_unlock(&volume->dirty_lock);
    onion_volume_release_batch(batch);
}

/* ---- flush ---- */

int onion_volume_commit_batch(struct onion_volume *volume, struct onion_head_log *log,
                              struct onion_dirty_records *batch, int of_sealed) {
    int status = batch->record_count && log->fd < 0 ? onion_head_log_begin(volume, log) : 0;
    if (status == 0)
        status = sync_segments(volume, of_sealed);
    if (status == 0 && batch->record_count)
        status = write_batch(volume, log, batch);
    if (status < 0) {
        onion_volume_put_back(volume, batch);
        return status;
    }
    /* This comes before a slot that the frame freed is used again, so that no record that is found later names it. */
    struct onion_journal_owner now = onion_head_log_owner(log);
    pthread_mutex_lock(&volume->dirty_lock);
    onion_journal_drop_taken(volume, &now);
    pthread_mutex_unlock(&volume->dirty_lock);
    /* The frame is durable, so the flush has happened. A failure to wipe its slots is reported all the same. */
    status = onion_volume_reclaim_freed(volume, batch);
    onion_volume_release_batch(batch);
    return status;
}

int onion_volume_flush_behind_gate(struct onion_volume *volume) {
    struct onion_dirty_records batch = onion_volume_take_dirty_records(volume, NULL);
    return onion_volume_commit_batch(volume, &volume->log, &batch, 0);
}

int onion_volume_flush(struct onion_volume *volume) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = onion_volume_flush_behind_gate(volume);
    onion_volume_open_flush_gate(volume);
    return status;
}

int onion_volume_relieve(struct onion_volume *volume) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    pthread_mutex_lock(&volume->dirty_lock);
    int must = dirty->freed_slots > dirty->flush_at_slots + (ONION_WAITING_BYTES_HARD >> volume->block_shift);
    pthread_mutex_unlock(&volume->dirty_lock);
    pthread_mutex_lock(&volume->flush_lock);
    int is_busy = volume->flush_busy;
    pthread_mutex_unlock(&volume->flush_lock);
    if (is_busy && !must) /* a flush is under way, which makes room too, or a seal, which may take longer */
        return 0;
    int status = onion_volume_flush(volume);
    if (!onion_has_no_room(status))
        return status;
    pthread_mutex_lock(&volume->dirty_lock);
    dirty->flush_at_records = dirty->record_count;
    dirty->flush_at_slots = dirty->freed_slots;
    __atomic_store_n(&volume->flush_wanted, 0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&volume->dirty_lock);
    onion_site_clear(); /* this error is not reported */
    return 0;
}

void onion_volume_start_writing(struct onion_volume *volume) {
    if (onion_volume_usable(volume) < 0)
        return;
    pthread_rwlock_rdlock(&volume->gate);
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (segment->own && segment->fd >= 0 && __atomic_load_n(&segment->dirty, __ATOMIC_SEQ_CST))
            onion_start_writing(segment->fd);
    }
    pthread_rwlock_unlock(&volume->gate);
}

int onion_volume_unflushed(struct onion_volume *volume) {
    if (onion_volume_usable(volume) < 0)
        return 0;
    pthread_rwlock_rdlock(&volume->gate);
    pthread_mutex_lock(&volume->dirty_lock);
    int found = volume->dirty_records.record_count != 0;
    pthread_mutex_unlock(&volume->dirty_lock);
    uint32_t count = volume->closed ? 0 : volume->segment_count;
    for (uint32_t i = 1; i <= count && !found; i++)
        found = volume->segments[i]->own && __atomic_load_n(&volume->segments[i]->dirty, __ATOMIC_SEQ_CST);
    pthread_rwlock_unlock(&volume->gate);
    return found;
}
