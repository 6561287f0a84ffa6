/* lifecycle.c: reading and writing a volume. See volume.h for what must hold, recovery.c for how it begins, flush.c for
 * flush, seal and rewrite. */
#define _GNU_SOURCE
#include "volume/volume.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "base/store_file.h"
#include "volume/internal.h"

#define WRITE_BATCH 256   /* blocks of write_blocks that share one pwrite */
#define ROOM_ATTEMPTS 64  /* flushes for the room of one change, which other writers may take */

/* ---- life ---- */

static void release_leaf(void *context, void *leaf) {
    (void)context;
    free(leaf);
}

void onion_volume_retire_leaf(void *context, void *leaf) {
    struct onion_volume *volume = context;
    onion_epoch_retire(&volume->epoch, release_leaf, NULL, leaf);
}

static void init_locks(struct onion_volume *volume) {
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
#ifdef __GLIBC__
    /* Else a stream of writers would keep a snapshot waiting for ever. */
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    pthread_rwlock_init(&volume->gate, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    for (int i = 0; i < ONION_STRIPES; i++)
        pthread_mutex_init(&volume->stripes[i], NULL);
    pthread_mutex_init(&volume->slots_lock, NULL);
    pthread_mutex_init(&volume->pending_lock, NULL);
    pthread_mutex_init(&volume->flush_lock, NULL);
    pthread_mutex_init(&volume->prepare_lock, NULL);
    pthread_cond_init(&volume->flush_free, NULL);
}

int onion_volume_new(uint32_t block_size, uint64_t size_bytes, const char *segments_directory,
                     const char *layers_directory, int wipe_zero, int writable, struct onion_volume **out) {
    uint32_t shift = (uint32_t)__builtin_ctz(block_size ? block_size : 1);
    if (block_size != 1u << shift || shift < ONION_BLOCK_SHIFT_MIN || shift > ONION_BLOCK_SHIFT_MAX ||
        size_bytes > ONION_VOLUME_BYTES_MAX)
        return -EINVAL;
    int status = onion_fault_install();
    if (status < 0)
        return status;
    struct onion_volume *volume;
    if (posix_memalign((void **)&volume, 64, sizeof *volume))
        return -ENOMEM;
    memset(volume, 0, sizeof *volume);
    volume->block_size = block_size;
    volume->block_shift = shift;
    volume->blocks_per_range = 1u << (ONION_RANGE_BYTES_SHIFT - shift);
    volume->size_bytes = size_bytes;
    volume->wipe_zero = wipe_zero;
    volume->writable = writable;
    volume->generation = 1;
    volume->log.fd = volume->next_log.fd = volume->prepared_log.fd = -1;
    volume->nothing_below = 1;
    volume->compact_at = 512u << 10;
    onion_journal_init(&volume->journal);
    init_locks(volume);
    onion_epoch_init(&volume->epoch);
    volume->segments_directory = strdup(segments_directory);
    volume->layers_directory = strdup(layers_directory);
    volume->segments = calloc(ONION_SEGMENT_LAST + 1, sizeof *volume->segments);
    static const unsigned char no_id[ONION_UUID_BYTES];
    (void)onion_segment_new("", no_id, 0, shift, &volume->vacant); /* NULL: no memory */
    /* Whole ranges; it grows with the volume. */
    uint64_t ranges = (size_bytes + (1ull << ONION_RANGE_BYTES_SHIFT) - 1) >> ONION_RANGE_BYTES_SHIFT;
    status = onion_map_init(&volume->index, (ranges ? ranges : 1) << (ONION_RANGE_BYTES_SHIFT - shift), shift);
    if (status == 0)
        status = onion_build_init(&volume->build, &volume->index);
    if (status == 0 && (!volume->segments_directory || !volume->layers_directory || !volume->segments ||
                        !volume->vacant))
        status = -ENOMEM;
    if (status < 0) {
        onion_volume_free(volume);
        return status;
    }
    *out = volume;
    return 0;
}

static void release_root(void *context, void *old) {
    (void)context;
    onion_old_root_free(old);
}

int onion_volume_grow_index(struct onion_volume *volume, uint64_t size_bytes) {
    struct onion_old_root *old;
    uint64_t blocks = (size_bytes >> volume->block_shift) + ((size_bytes & (volume->block_size - 1)) != 0);
    int status = onion_map_grow(&volume->index, blocks, &old);
    if (status == 0 && old)
        onion_epoch_retire(&volume->epoch, release_root, NULL, old);
    return status;
}

void onion_head_log_close(struct onion_head_log *log) {
    if (log->fd >= 0)
        close(log->fd);
    free(log->path);
    *log = (struct onion_head_log){.fd = -1};
}

void onion_volume_close(struct onion_volume *volume) {
    if (__atomic_exchange_n(&volume->closed, 1, __ATOMIC_SEQ_CST) || volume->forked)
        return;
    /* A flush under way goes first; one that waits for its outcome (seal, rewrite) finds the volume closed. */
    pthread_mutex_lock(&volume->flush_lock);
    while (volume->flush_busy && !volume->sealing && !volume->rewriting && !volume->frozen)
        pthread_cond_wait(&volume->flush_free, &volume->flush_lock);
    int gate_is_ours = !volume->flush_busy;
    volume->flush_busy = 1;
    pthread_mutex_unlock(&volume->flush_lock);
    pthread_mutex_lock(&volume->prepare_lock);
    if (!volume->frozen) /* else this thread has it */
        pthread_rwlock_wrlock(&volume->gate);
    onion_epoch_wait(&volume->epoch);
    onion_below_free(volume->below);
    volume->below = NULL;
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        if (volume->segments[i] != volume->vacant)
            onion_segment_free(volume->segments[i]);
        volume->segments[i] = NULL;
    }
    volume->segment_count = 0;
    onion_mappings_give_back(volume->mappings);
    volume->mappings = 0;
    onion_segment_free(volume->next_spare);
    volume->next_spare = NULL;
    if (volume->base)
        onion_base_release(NULL, volume->base);
    volume->base = NULL;
    onion_head_log_close(&volume->log);
    onion_head_log_close(&volume->next_log);
    onion_head_log_close(&volume->prepared_log);
    onion_journal_close(volume);
    volume->index.retire = NULL;
    onion_map_destroy(&volume->index);
    onion_build_destroy(&volume->build);
    pthread_rwlock_unlock(&volume->gate);
    pthread_mutex_unlock(&volume->prepare_lock);
    pthread_mutex_lock(&volume->flush_lock);
    if (gate_is_ours)
        volume->flush_busy = 0;
    pthread_cond_broadcast(&volume->flush_free);
    pthread_mutex_unlock(&volume->flush_lock);
}

void onion_volume_free(struct onion_volume *volume) {
    if (!volume || volume->forked) /* a child of fork() may have copied locks in any state: leave all to exit */
        return;
    onion_volume_close(volume);
    onion_epoch_destroy(&volume->epoch);
    free(volume->pending.records);
    free(volume->pending.freed);
    free(volume->next_numbers);
    onion_segment_free(volume->vacant);
    free(volume->segments);
    free(volume->segments_directory);
    free(volume->layers_directory);
    free(volume);
}

uint64_t onion_volume_memory(const struct onion_volume *volume) {
    uint64_t ranges = (onion_volume_size(volume) >> ONION_RANGE_BYTES_SHIFT) + 1;
    return ranges * sizeof(uint64_t) + (uint64_t)__atomic_load_n(&volume->index.leaf_bytes, __ATOMIC_RELAXED);
}

/* ---- changing the map ---- */

int onion_pending_make_room(struct onion_volume *volume) {
    struct onion_pending *pending = &volume->pending;
    if (__builtin_expect(pending->record_count + 2 <= pending->record_capacity, 1))
        return 0;
    if (volume->journal.path) {
        int status = onion_journal_make_room(volume);
        if (status < 0 || pending->published)
            return status;
    }
    size_t capacity = pending->record_capacity * 2 + 256;
    struct onion_record *records = realloc(pending->records, capacity * sizeof *records);
    if (!records)
        return -ENOMEM;
    pending->records = records;
    pending->record_capacity = capacity;
    return 0;
}

/* Joins the record to the last one where it continues it, which is what sequential writes do. */
static int joined(struct onion_pending *pending, const struct onion_record *record) {
    if (pending->record_count == pending->join_from)
        return 0;
    struct onion_record *last = &pending->records[pending->record_count - 1];
    int goes_on = last->kind == record->kind && last->segment == record->segment &&
                  last->block_index + last->block_count == record->block_index &&
                  (record->kind != ONION_RECORD_DATA || last->slot + last->block_count == record->slot) &&
                  (uint64_t)last->block_count + record->block_count < UINT32_MAX;
    if (goes_on)
        last->block_count += record->block_count;
    return goes_on;
}

struct put {
    struct onion_volume *volume;
    const struct onion_record *record;
};

/* A process that is killed here leaves the list as it was before, or with the whole record. */
static int put_record(void *context) {
    const struct put *put = context;
    struct onion_pending *pending = &put->volume->pending;
    size_t count = pending->record_count;
    onion_fault_watch(pending->records + (count ? count - 1 : 0), 3 * sizeof *put->record);
    if (joined(pending, put->record)) {
        onion_fault_unwatch();
        return 0;
    }
    int declares = put->record->kind == ONION_RECORD_DATA && put->record->segment != pending->declared;
    if (declares)
        pending->records[count++] = onion_record_segment(put->record->segment, put->volume->segments[put->record->segment]->uuid);
    pending->records[count++] = *put->record;
    if (pending->published && !pending->is_held) {
        onion_fault_watch(pending->published, sizeof *pending->published);
        __atomic_store_n(pending->published, count, __ATOMIC_RELEASE);
    }
    onion_fault_unwatch();
    if (declares)
        pending->declared = put->record->segment;
    pending->record_count = count;
    return 0;
}

int onion_pending_put(struct onion_volume *volume, const struct onion_record *record) {
    struct put put = {volume, record};
    return onion_fault_run(put_record, &put);
}

/* What a record that was put changed of the list. */
struct mark {
    size_t record_count;
    uint32_t last_blocks, declared;
};

static struct mark mark_pending(const struct onion_pending *pending) {
    size_t count = pending->record_count;
    return (struct mark){count, count ? pending->records[count - 1].block_count : 0, pending->declared};
}

/* Takes the last record back, which the index could not take. */
static void take_back(struct onion_pending *pending, const struct mark *mark) {
    pending->record_count = mark->record_count;
    pending->declared = mark->declared;
    if (pending->published && !pending->is_held)
        __atomic_store_n(pending->published, mark->record_count, __ATOMIC_RELEASE);
    if (mark->record_count)
        pending->records[mark->record_count - 1].block_count = mark->last_blocks;
}

static int reserve_freed(struct onion_pending *pending, size_t more) {
    if (pending->freed_count + more <= pending->freed_capacity)
        return 0;
    size_t capacity = pending->freed_capacity * 2 + more + 64;
    struct onion_freed *freed = realloc(pending->freed, capacity * sizeof *freed);
    if (!freed)
        return -ENOMEM;
    pending->freed = freed;
    pending->freed_capacity = capacity;
    return 0;
}

/* Notes the slots that the head holds for these blocks; they are counted only once the index no longer has them. */
static int64_t note_freed(struct onion_volume *volume, uint64_t block_index, uint64_t block_count) {
    size_t noted = 0;
    uint64_t at = block_index, end = block_index + block_count;
    struct onion_run run;
    while (at < end && onion_map_next(&volume->index, at, end, &run)) {
        at = run.block_index + run.block_count;
        if (!onion_place_is_data(run.place) ||
            !onion_segment_is_head(volume, volume->segments[onion_place_segment(run.place)]))
            continue;
        if (reserve_freed(&volume->pending, noted + 1) < 0)
            return -ENOMEM;
        volume->pending.freed[volume->pending.freed_count + noted++] = (struct onion_freed){
            onion_place_segment(run.place), onion_place_slot(run.place), (uint32_t)run.block_count};
    }
    return (int64_t)noted;
}

static struct onion_record record_of(uint64_t block_index, uint64_t block_count, onion_place place) {
    struct onion_record record = {.block_index = block_index, .block_count = (uint32_t)block_count};
    if (onion_place_is_data(place)) {
        record.kind = ONION_RECORD_DATA;
        record.segment = (uint16_t)onion_place_segment(place);
        record.slot = onion_place_slot(place);
    } else {
        record.kind = place == ONION_PLACE_HOLE ? ONION_RECORD_HOLE : ONION_RECORD_ZERO;
    }
    return record;
}

static void count_freed(struct onion_volume *volume, size_t noted) {
    struct onion_pending *pending = &volume->pending;
    for (size_t i = 0; i < noted; i++)
        pending->freed_slots += pending->freed[pending->freed_count + i].count;
    pending->freed_count += noted;
    if (pending->record_count > pending->flush_at_records + ONION_WAITING_RECORDS_MAX ||
        pending->freed_slots > pending->flush_at_slots + (ONION_WAITING_BYTES_MAX >> volume->block_shift))
        __atomic_store_n(&volume->flush_wanted, 1, __ATOMIC_RELAXED);
}

int onion_volume_change(struct onion_volume *volume, uint64_t block_index, uint64_t block_count, onion_place place) {
    struct onion_record record = record_of(block_index, block_count, place);
    struct onion_pending *pending = &volume->pending;
    pthread_mutex_lock(&volume->pending_lock);
    int64_t noted = onion_pending_make_room(volume);
    if (noted == 0)
        noted = note_freed(volume, block_index, block_count);
    struct mark mark = mark_pending(pending);
    /* The record first: its page may fail, and then nothing has changed. */
    int status = noted < 0 ? (int)noted : onion_pending_put(volume, &record);
    if (status == 0) {
        status = onion_map_set(&volume->index, block_index, block_count, place);
        if (status < 0)
            take_back(pending, &mark);
        else
            count_freed(volume, (size_t)noted);
    }
    pthread_mutex_unlock(&volume->pending_lock);
    return status;
}

/* ---- writing ---- */

static int begin_write(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    int status = onion_volume_usable(volume);
    if (status < 0) /* in the child of a fork the gate may be held by nobody, for ever */
        return status;
    pthread_rwlock_rdlock(&volume->gate);
    status = onion_volume_usable(volume);
    if (status == 0 && !volume->own) /* a view, or its head was not opened */
        status = ONION_E_READ_ONLY;
    if (status == 0 && !onion_volume_in_bounds(volume, offset, length))
        status = ONION_E_BOUNDS;
    if (status < 0)
        pthread_rwlock_unlock(&volume->gate);
    return status;
}

/* For a change that found no room for its record: a flush makes some. The gate is given up meanwhile, and stays so on an
 * error. */
static int flush_for_room(struct onion_volume *volume, uint64_t offset, uint64_t length, uint32_t *attempts) {
    pthread_rwlock_unlock(&volume->gate);
    int status = (*attempts)++ < ROOM_ATTEMPTS ? onion_volume_flush(volume) : -ENOSPC;
    return status < 0 ? status : begin_write(volume, offset, length);
}

static pthread_mutex_t *stripe_of(struct onion_volume *volume, uint64_t block_index) {
    return &volume->stripes[onion_map_range_of(&volume->index, block_index) % ONION_STRIPES];
}

static int is_own(const struct onion_volume *volume, onion_place place) {
    if (!onion_place_is_data(place))
        return 0;
    const struct onion_segment *segment = volume->segments[onion_place_segment(place)];
    return segment->own && onion_segment_is_head(volume, segment);
}

/* Slots for new blocks in the head's segment, which is made now if this is the first. */
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

/* Slots of a write that failed. They may hold some of its bytes, which only the next open wipes, or, where the segment
 * is sealed before, a scrub. */
static void return_slots(struct onion_volume *volume, struct onion_segment *segment, uint32_t slot, uint32_t count) {
    onion_volume_want_scrub(volume, segment);
    pthread_mutex_lock(&volume->slots_lock);
    onion_segment_give_back(segment, slot, count);
    pthread_mutex_unlock(&volume->slots_lock);
}

static __attribute__((noinline, cold)) int write_fault(int status, const struct onion_segment *segment, uint32_t slot) {
    return onion_site_set(status, segment->path, onion_slot_offset(segment->block_shift, slot));
}

static int write_slots(struct onion_segment *segment, uint32_t slot, uint64_t start, uint64_t length,
                       const void *bytes) {
    int status =
        onion_pwrite_all(segment->fd, bytes, length, onion_slot_offset(segment->block_shift, slot) + start);
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
            status = onion_volume_change(volume, block_index, (uint64_t)taken, onion_place_make(segment->number, slot));
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

/* Whole blocks of one 2 MiB range: in place where the head holds them, else in new slots. */
static int write_whole(struct onion_volume *volume, uint64_t block_index, uint64_t count, const char *bytes) {
    while (count) {
        struct onion_run run;
        onion_map_run_at(&volume->index, block_index, count, &run);
        int own = is_own(volume, run.place), status;
        if (own) {
            status = write_slots(volume->segments[onion_place_segment(run.place)], onion_place_slot(run.place), 0,
                                 run.block_count << volume->block_shift, bytes);
        } else {
            /* Neighbours that need new slots too share one write. */
            struct onion_run next;
            while (run.block_count < count) {
                onion_map_run_at(&volume->index, block_index + run.block_count, count - run.block_count, &next);
                if (is_own(volume, next.place))
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
    if (!fresh && is_own(volume, run.place))
        return write_slots(volume->segments[onion_place_segment(run.place)], onion_place_slot(run.place), start, length,
                           bytes);
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

/* A write inside one 2 MiB range, its stripe held. */
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

int onion_volume_write(struct onion_volume *volume, uint64_t offset, uint64_t length, const void *bytes) {
    int status = begin_write(volume, offset, length);
    if (status < 0)
        return status;
    const char *from = bytes;
    uint32_t attempts = 0;
    while (length && status == 0) {
        uint64_t part = until_range_end(offset, length);
        pthread_mutex_t *stripe = stripe_of(volume, offset >> volume->block_shift);
        pthread_mutex_lock(stripe);
        status = write_in_range(volume, offset, part, from);
        pthread_mutex_unlock(stripe);
        if (status == ONION_E_JOURNAL_FULL) {
            status = flush_for_room(volume, offset, length, &attempts);
            if (status < 0)
                return status;
            continue;
        }
        offset += part, from += part, length -= part, attempts = 0;
    }
    pthread_rwlock_unlock(&volume->gate);
    return onion_volume_after_write(volume, status);
}

/* ---- zero and trim ---- */

/* Never written; not const, so that it costs no room in the file. */
static char zeros[1 << ONION_BLOCK_SHIFT_MAX];

/* Part of a block becomes zero; nothing to do where all of it reads zero. */
static int zero_part(struct onion_volume *volume, uint64_t block_index, uint32_t start, uint32_t length) {
    onion_place place = onion_map_lookup(&volume->index, block_index);
    int reads_zero = place == ONION_PLACE_ZERO || (place == ONION_PLACE_HOLE && !volume->base);
    return reads_zero ? 0 : onion_volume_write_part(volume, block_index, start, length, zeros, 0);
}

static int zero_whole(struct onion_volume *volume, uint64_t block_index, uint64_t count) {
    onion_place wanted = volume->nothing_below ? ONION_PLACE_HOLE : ONION_PLACE_ZERO;
    while (count) {
        struct onion_run run;
        onion_map_run_at(&volume->index, block_index, count, &run);
        int status = run.place == wanted ? 0 : onion_volume_change(volume, block_index, run.block_count, wanted);
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
    /* The last block of the volume counts as whole when the range goes to its end. */
    uint64_t whole = to_the_end ? (length + mask) >> shift : length >> shift;
    if (status == 0 && whole)
        status = zero_whole(volume, offset >> shift, whole);
    if (status == 0 && length > whole << shift)
        status = zero_part(volume, (offset >> shift) + whole, 0, (uint32_t)(length - (whole << shift)));
    return status;
}

int onion_volume_zero(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    int status = begin_write(volume, offset, length);
    if (status < 0)
        return status;
    uint32_t attempts = 0;
    while (length && status == 0) {
        uint64_t part = until_range_end(offset, length);
        pthread_mutex_t *stripe = stripe_of(volume, offset >> volume->block_shift);
        pthread_mutex_lock(stripe);
        status = zero_in_range(volume, offset, part, offset + part == onion_volume_size(volume));
        pthread_mutex_unlock(stripe);
        if (status == ONION_E_JOURNAL_FULL) {
            status = flush_for_room(volume, offset, length, &attempts);
            if (status < 0)
                return status;
            continue;
        }
        offset += part, length -= part, attempts = 0;
    }
    pthread_rwlock_unlock(&volume->gate);
    return onion_volume_after_write(volume, status);
}

/* ---- many blocks at once ---- */

/* One block of a batch that may already be the head's: in place then. */
static int write_listed(struct onion_volume *volume, uint64_t block_index, const char *bytes, uint64_t length) {
    pthread_mutex_t *stripe = stripe_of(volume, block_index);
    pthread_mutex_lock(stripe);
    int status = length == volume->block_size ? write_whole(volume, block_index, 1, bytes)
                                              : onion_volume_write_part(volume, block_index, 0, (uint32_t)length, bytes, 0);
    pthread_mutex_unlock(stripe);
    return status;
}

/* Blocks that need new slots get consecutive ones, whatever their places on the disk, and share one write. The slots
 * are ours alone until they are mapped, so the write needs no stripe. */
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
                                             onion_place_make(segment->number, slot + (uint32_t)i));
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

/* How many of the next blocks are whole and not the head's yet. A guess: other writers are at work, and so may replace
 * the leaf that is looked at, which only a reader's ticket keeps. */
static uint64_t count_fresh(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count,
                            uint64_t whole_blocks) {
    uint64_t fresh = 0;
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    while (fresh < count && fresh < WRITE_BATCH && block_indices[fresh] < whole_blocks &&
           !is_own(volume, onion_map_lookup(&volume->index, block_indices[fresh])))
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
        if (status == ONION_E_JOURNAL_FULL) { /* what is written is the head's own now, and is written again in place */
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
    return onion_volume_after_write(volume, status);
}

/* ---- looking at the index ---- */

int64_t onion_volume_runs(struct onion_volume *volume, uint64_t block_index, uint64_t block_end,
                          struct onion_run *runs, uint64_t capacity, uint64_t *next) {
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    int64_t count = onion_volume_usable(volume);
    while (count >= 0 && (uint64_t)count < capacity && block_index < block_end) {
        if (!onion_map_next(&volume->index, block_index, block_end, &runs[count])) {
            block_index = block_end;
            break;
        }
        block_index = runs[count].block_index + runs[count].block_count;
        count++;
    }
    *next = block_index;
    onion_epoch_leave(&volume->epoch, ticket);
    return count;
}

int onion_volume_wait_for_readers(struct onion_volume *volume) {
    int status = onion_volume_usable(volume);
    if (status == 0)
        onion_epoch_wait(&volume->epoch);
    return status;
}

int onion_volume_scrub_wanted(struct onion_volume *volume, unsigned char (*uuids)[ONION_UUID_BYTES], uint32_t capacity) {
    uint32_t count = 0;
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    __atomic_store_n(&volume->scrub_wanted, 0, __ATOMIC_SEQ_CST);
    pthread_rwlock_rdlock(&volume->gate);
    for (uint32_t i = 1; i <= volume->segment_count && count < capacity; i++)
        if (!is_own(volume, onion_place_make(i, 0)) &&
            __atomic_exchange_n(&volume->segments[i]->scrub_wanted, 0, __ATOMIC_SEQ_CST))
            memcpy(uuids[count++], volume->segments[i]->uuid, ONION_UUID_BYTES);
    pthread_rwlock_unlock(&volume->gate);
    if (count == capacity)
        __atomic_store_n(&volume->scrub_wanted, 1, __ATOMIC_SEQ_CST); /* there may be more */
    return (int)count;
}

void onion_volume_scrub_again(struct onion_volume *volume, const unsigned char (*uuids)[ONION_UUID_BYTES],
                              uint32_t count) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return;
    pthread_rwlock_rdlock(&volume->gate);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = onion_volume_find_segment(volume, uuids[i]);
        if (number)
            onion_volume_want_scrub(volume, volume->segments[number]);
    }
    pthread_rwlock_unlock(&volume->gate);
}

uint64_t onion_volume_take_unreachable(struct onion_volume *volume) {
    return __atomic_exchange_n(&volume->bytes_unreachable, 0, __ATOMIC_RELAXED);
}

int onion_volume_wants_scrub(struct onion_volume *volume) {
    return __atomic_load_n(&volume->scrub_wanted, __ATOMIC_SEQ_CST);
}

uint64_t onion_segment_slots_in_file(const struct onion_segment *segment) {
    struct stat info;
    if (!__atomic_load_n(&segment->created, __ATOMIC_SEQ_CST))
        return 0;
    if (segment->fd < 0 || fstat(segment->fd, &info))
        return segment->next_slot;
    return ((uint64_t)info.st_size - ONION_HEADER_BYTES) >> segment->block_shift;
}

static struct onion_segment_info info_of(const struct onion_volume *volume, const struct onion_segment *segment) {
    struct onion_segment_info info = {
        .number = segment->number, .slots = onion_segment_slots_in_file(segment), .role = onion_segment_is_head(volume, segment) ? 1 + segment->own : 0};
    memcpy(info.uuid, segment->uuid, ONION_UUID_BYTES);
    return info;
}

uint32_t onion_volume_segments(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    pthread_rwlock_rdlock(&volume->gate);
    uint32_t found = 0, count = volume->closed ? 0 : volume->segment_count;
    for (uint32_t i = 1; i <= count; i++) {
        if (volume->segments[i] == volume->vacant)
            continue;
        if (found < capacity)
            infos[found] = info_of(volume, volume->segments[i]);
        found++;
    }
    pthread_rwlock_unlock(&volume->gate);
    return found;
}

uint32_t onion_volume_just_sealed(struct onion_volume *volume, struct onion_segment_info *infos, uint32_t capacity) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return 0;
    pthread_rwlock_rdlock(&volume->gate);
    uint32_t found = 0, count = volume->closed || !volume->sealing ? 0 : volume->segment_count;
    for (uint32_t i = 1; i <= count; i++) {
        const struct onion_segment *segment = volume->segments[i];
        if (!segment->own || onion_segment_is_head(volume, segment))
            continue;
        if (found < capacity)
            infos[found] = info_of(volume, segment);
        found++;
    }
    pthread_rwlock_unlock(&volume->gate);
    return found;
}
