/* seal.c: a snapshot: the head becomes a sealed layer, and the next one begins, whose files may be made beforehand. See
 * volume.h for what must hold.
 *
 * A seal has stages, so that several volumes can be cut at one instant; each can be the last, and is then undone:
 *   BEGUN     the flush gate is closed, the next log and spare are set aside; where much waited, most of it is durable
 *   HELD      writers wait at the gate
 *   CUT       the dirty records are taken and the heads are swapped; writers still wait
 *   RELEASED  writers go on in the new head
 *   SYNCED    the old head is durable, and waits for its outcome
 * group_cut.c takes several volumes from BEGUN to RELEASED.
 * Between two calls `sealing` says that nobody is inside, so that a close need not wait for the outcome. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "volume/internal.h"

#define NUMBERS_KEPT 256u /* of the segments, for what has to go on when no snapshot can be taken any more */

/* The old head's segments stop being the head's, and the spare becomes the new one's. Nobody writes meanwhile. */
static void swap_heads(struct onion_volume *volume) {
    volume->generation++;
    struct onion_segment *own = volume->segments[volume->spare];
    own->generation = volume->generation;
    own->own = 1;
    volume->own = volume->spare;
    volume->spare = 0;
    volume->nothing_below = 0;
}

/* The old head goes on, and what the new one took becomes its own too. Nobody counted the slots of the old one that
 * were replaced meanwhile. */
static void unswap_heads(struct onion_volume *volume) {
    pthread_rwlock_wrlock(&volume->gate);
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        struct onion_segment *segment = volume->segments[i];
        if (onion_segment_is_head(volume, segment))
            segment->generation--;
        if (segment->generation == volume->generation - 1)
            onion_volume_want_reclaim(volume, segment);
    }
    volume->generation--;
    pthread_rwlock_unlock(&volume->gate);
}

static int prepare_log(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    struct onion_head_log *log = &volume->prepared_log;
    int status = 0;
    if (log->fd < 0) {
        onion_head_log_close(log);
        status = onion_head_log_describe(log, map_path, map_id);
        if (status == 0)
            status = onion_head_log_begin(volume, log);
    }
    return status;
}

/* Makes the files step by step. Any step may be the last: the first flush of the next head does the rest. */
static int prepare_locked(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    pthread_rwlock_rdlock(&volume->gate);
    int status = onion_volume_usable(volume);
    struct onion_segment *spare = status == 0 && volume->spare ? volume->segments[volume->spare] : NULL;
    if (spare && (volume->seal.spare_taken || memcmp(spare->uuid, map_id, ONION_UUID_BYTES)))
        spare = NULL;
    pthread_rwlock_unlock(&volume->gate);
    if (!spare)
        return status < 0 ? status : -EBUSY;
    status = prepare_log(volume, map_path, map_id);
    if (status == 0 && !spare->created)
        status = onion_segment_create(spare);
    if (status == 0 && spare->directory_dirty) {
        status = onion_volume_sync_segment_names(volume);
        if (status == 0)
            spare->directory_dirty = 0;
    }
    if (status == 0 && volume->prepared_log.is_new)
        status = onion_head_log_sync_new(volume, &volume->prepared_log);
    return status;
}

int onion_volume_prepare(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    int status = onion_volume_usable(volume);
    if (status < 0) /* in the child of a fork the lock may be held by nobody, for ever */
        return status;
    pthread_mutex_lock(&volume->prepare_lock);
    status = prepare_locked(volume, map_path, map_id);
    pthread_mutex_unlock(&volume->prepare_lock);
    return status;
}

/* Behind the flush gate, so the head and its log stay the same. */
static int make_map(struct onion_volume *volume) {
    struct onion_segment *segment = volume->segments[volume->own];
    int status = volume->log.fd < 0 ? onion_head_log_begin(volume, &volume->log) : 0;
    if (status == 0 && volume->log.is_new)
        status = onion_head_log_sync_new(volume, &volume->log);
    if (status == 0 && __atomic_exchange_n(&segment->directory_dirty, 0, __ATOMIC_SEQ_CST))
        status = onion_volume_sync_segment_names(volume);
    return status;
}

int onion_volume_make_map(struct onion_volume *volume) {
    int status = onion_volume_try_flush_gate(volume);
    if (status < 0)
        return status;
    status = make_map(volume);
    onion_volume_open_flush_gate(volume);
    return status;
}

/* The log of the head that a seal begins: the prepared one, or one without a file. */
static int take_next_log(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    struct onion_head_log *prepared = &volume->prepared_log;
    if (prepared->fd < 0 || memcmp(prepared->map_id, map_id, ONION_UUID_BYTES))
        return onion_head_log_describe(&volume->next_log, map_path, map_id);
    volume->next_log = *prepared;
    *prepared = (struct onion_head_log){.fd = -1};
    return 0;
}

/* After a seal that failed: what was prepared still is, unless the spare became the old head's. */
static void give_next_log_back(struct onion_volume *volume) {
    if (volume->spare && volume->next_log.fd >= 0)
        volume->prepared_log = volume->next_log;
    else
        onion_head_log_close(&volume->next_log);
    volume->next_log = (struct onion_head_log){.fd = -1};
}

/* Sets aside what the commit of a seal needs and might not get: a number in the index, one in the log that is sealed,
 * and memory. Where a seal is refused, there are numbers left for opening the volume again, and for a head that goes on
 * with the spare after an aborted seal. */
static int make_room_for_spare(struct onion_volume *volume) {
    static const unsigned char no_id[ONION_UUID_BYTES];
    if (onion_volume_numbers_left(volume) <= NUMBERS_KEPT ||
        volume->log.numbers_given + onion_volume_own_segment_count(volume) > ONION_SEGMENT_LAST - 2 * NUMBERS_KEPT)
        return ONION_E_NUMBERS;
    if (volume->next_spare)
        return 0;
    int status = onion_volume_take_mappings(volume, 1);
    if (status < 0)
        return status;
    return onion_segment_new(&volume->store, volume->segments_directory, no_id, 0, volume->block_shift,
                             &volume->next_spare);
}

/* ---- the stages ---- */

static int set_aside(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    pthread_mutex_lock(&volume->prepare_lock); /* a preparation under way ends first, and none begins */
    int status = volume->spare ? make_room_for_spare(volume) : -EBUSY;
    if (status == 0)
        status = take_next_log(volume, map_path, map_id);
    volume->seal.spare_taken = status == 0;
    pthread_mutex_unlock(&volume->prepare_lock);
    return status;
}

static void give_back_what_was_set_aside(struct onion_volume *volume) {
    pthread_mutex_lock(&volume->prepare_lock);
    give_next_log_back(volume);
    volume->seal.spare_taken = 0;
    pthread_mutex_unlock(&volume->prepare_lock);
}

/* What is flushed before the cut is synced twice: with what came meanwhile, once more behind it. That is left out where the
 * frame of what waits, and of as much again, lies in room that the log has on the disk already. Then the sync behind the cut
 * needs no new room, which a full disk could refuse: the seal would be undone, and its spare be spent. */
static int flushes_before_cut(struct onion_volume *volume) {
    pthread_mutex_lock(&volume->dirty_lock);
    size_t count = volume->dirty_records.record_count;
    pthread_mutex_unlock(&volume->dirty_lock);
    const struct onion_head_log *log = &volume->log;
    size_t records = 2 * count + onion_volume_own_segment_count(volume);
    return count && (log->fd < 0 || log->cursor.offset + onion_frame_bytes(records) > log->room_end);
}

static int begin(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    (void)onion_fault_install(); /* see base/sigbus.h */
    int status = set_aside(volume, map_path, map_id);
    if (status < 0)
        return status;
    if (flushes_before_cut(volume))
        status = onion_volume_flush_behind_gate(volume); /* with writers at work */
    if (status < 0)
        give_back_what_was_set_aside(volume);
    return status;
}

/* Writers wait meanwhile. */
static void cut(struct onion_volume *volume) {
    volume->seal.batch = onion_volume_take_dirty_records(volume, &volume->next_log);
    volume->seal.size_bytes = volume->size_bytes;
    swap_heads(volume);
}

static void undo_cut(struct onion_volume *volume) {
    unswap_heads(volume);
    onion_volume_resolve_owner(volume);
    give_back_what_was_set_aside(volume);
}

/* Makes what was cut off durable. On failure the old head goes on. */
static int sync_cut(struct onion_volume *volume, struct onion_sealed *sealed) {
    int status = onion_volume_commit_batch(volume, &volume->log, &volume->seal.batch, 1);
    volume->seal.batch = (struct onion_dirty_records){0};
    if (status < 0) {
        undo_cut(volume);
        return status;
    }
    sealed->size_bytes = volume->seal.size_bytes;
    sealed->map_length = volume->log.cursor.sequence ? volume->log.cursor.offset : 0;
    sealed->map_frames = volume->log.cursor.sequence;
    sealed->map_crc = volume->log.cursor.crc;
    return 0;
}

/* Goes on with a seal that is in this stage; a close waits from here until `leave`. */
static int enter(struct onion_volume *volume, enum onion_seal_stage stage) {
    int status = onion_volume_usable(volume);
    if (status < 0) /* in the child of a fork the lock may be held by nobody, for ever */
        return status;
    pthread_mutex_lock(&volume->flush_lock);
    status = onion_volume_usable(volume);
    if (status == 0 && (!volume->sealing || volume->seal.stage != stage))
        status = -EINVAL;
    if (status == 0)
        volume->sealing = 0;
    pthread_mutex_unlock(&volume->flush_lock);
    return status;
}

/* The same for the outcome, which a poisoned volume has too. -EINVAL: there is none to be told. */
static int enter_last(struct onion_volume *volume) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return ONION_E_FORKED;
    pthread_mutex_lock(&volume->flush_lock);
    int status = volume->sealing ? onion_volume_usable(volume) : -EINVAL;
    if (status == 0 || status == ONION_E_POISONED)
        volume->sealing = 0;
    pthread_mutex_unlock(&volume->flush_lock);
    return status;
}

static void leave(struct onion_volume *volume, enum onion_seal_stage stage) {
    volume->seal.stage = stage;
    onion_volume_keep_flush_gate(volume, &volume->sealing, 1);
}

static void end(struct onion_volume *volume) {
    volume->seal.stage = ONION_SEAL_NONE;
    onion_volume_open_flush_gate(volume);
}

int onion_volume_seal_would_wait(struct onion_volume *volume) {
    if (onion_volume_usable(volume) < 0) /* in the child of a fork the lock may be held by nobody, for ever */
        return 0;
    pthread_mutex_lock(&volume->flush_lock); /* nobody begins to flush meanwhile, so the log stays as it is */
    int waits = volume->flush_busy || flushes_before_cut(volume);
    pthread_mutex_unlock(&volume->flush_lock);
    return waits;
}

int onion_volume_seal_begin(struct onion_volume *volume, const char *map_path, const unsigned char *map_id) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = begin(volume, map_path, map_id);
    if (status < 0)
        end(volume);
    else
        leave(volume, ONION_SEAL_BEGUN);
    return status;
}

int onion_volume_seal_hold(struct onion_volume *volume) {
    int status = enter(volume, ONION_SEAL_BEGUN);
    if (status < 0)
        return status;
    pthread_rwlock_wrlock(&volume->gate);
    leave(volume, ONION_SEAL_HELD);
    return 0;
}

int onion_volume_seal_cut(struct onion_volume *volume) {
    int status = enter(volume, ONION_SEAL_HELD);
    if (status < 0)
        return status;
    cut(volume);
    leave(volume, ONION_SEAL_CUT);
    return 0;
}

void onion_volume_seal_release(struct onion_volume *volume) {
    enum onion_seal_stage stage = volume->seal.stage;
    if (onion_volume_usable(volume) == ONION_E_FORKED || (stage != ONION_SEAL_HELD && stage != ONION_SEAL_CUT))
        return;
    volume->seal.stage = stage == ONION_SEAL_CUT ? ONION_SEAL_RELEASED : ONION_SEAL_BEGUN;
    pthread_rwlock_unlock(&volume->gate);
}

int onion_volume_seal_sync(struct onion_volume *volume, struct onion_sealed *sealed) {
    int status = enter(volume, ONION_SEAL_RELEASED);
    if (status < 0)
        return status;
    status = sync_cut(volume, sealed);
    if (status < 0)
        end(volume);
    else
        leave(volume, ONION_SEAL_SYNCED);
    return status;
}

int onion_volume_seal(struct onion_volume *volume, const char *map_path, const unsigned char *map_id,
                      struct onion_sealed *sealed) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = begin(volume, map_path, map_id);
    if (status == 0) {
        pthread_rwlock_wrlock(&volume->gate);
        cut(volume);
        pthread_rwlock_unlock(&volume->gate);
        status = sync_cut(volume, sealed);
    }
    if (status < 0)
        end(volume);
    else
        leave(volume, ONION_SEAL_SYNCED);
    return status;
}

int onion_volume_set_spare(struct onion_volume *volume, const unsigned char *spare) {
    int status = onion_volume_usable(volume);
    if (status < 0)
        return status;
    pthread_rwlock_wrlock(&volume->gate);
    status = onion_volume_usable(volume);
    if (status == 0 && volume->spare)
        status = -EBUSY;
    if (status == 0 && volume->next_spare && onion_volume_numbers_left(volume)) {
        onion_segment_rename(volume->next_spare, spare);
        volume->spare = onion_volume_number_segment(volume, volume->next_spare);
        volume->next_spare = NULL;
    } else if (status == 0) {
        status = onion_volume_add_segment(volume, spare, &volume->spare);
    }
    pthread_rwlock_unlock(&volume->gate);
    return status;
}

int onion_volume_has_spare(struct onion_volume *volume) { return volume->spare != 0; }

/* Closes the segments of the sealed head, which are only read from now on. So a deep chain costs no descriptors. */
static void close_sealed_segments(struct onion_volume *volume) {
    pthread_rwlock_wrlock(&volume->gate);
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        struct onion_segment *segment = volume->segments[i];
        if (onion_segment_is_head(volume, segment))
            continue;
        segment->log_number = 0; /* it was of the log that is sealed */
        if (!segment->own)
            continue;
        uint64_t slots = onion_segment_slots_in_file(segment);
        pthread_mutex_lock(&segment->mapping_lock);
        if (segment->fd >= 0)
            close(segment->fd);
        segment->fd = -1;
        segment->own = 0;
        pthread_mutex_unlock(&segment->mapping_lock);
        if (!slots) /* no block was ever in it, so no reader knows of it, and the catalog has let it go */
            onion_segment_free(onion_volume_vacate(volume, i));
    }
    pthread_rwlock_unlock(&volume->gate);
}

/* ---- its outcome ---- */

int onion_volume_seal_commit(struct onion_volume *volume, const unsigned char *next_spare) {
    if (volume->seal.stage != ONION_SEAL_SYNCED)
        return -EINVAL;
    int status = enter_last(volume);
    if (status == -EINVAL || status == ONION_E_FORKED)
        return status;
    if (status != ONION_E_CLOSED) {
        pthread_mutex_lock(&volume->prepare_lock);
        volume->seal.spare_taken = 0;
        pthread_mutex_unlock(&volume->prepare_lock);
        onion_head_log_close(&volume->log);
        volume->log = volume->next_log;
        volume->next_log = (struct onion_head_log){.fd = -1};
        onion_volume_resolve_owner(volume);
        onion_volume_note_log_bytes(volume, &volume->log);
        close_sealed_segments(volume);
        status = onion_volume_set_spare(volume, next_spare);
    }
    end(volume);
    return status;
}

int onion_volume_seal_abort(struct onion_volume *volume) {
    int status = enter_last(volume);
    if (status == -EINVAL || status == ONION_E_FORKED)
        return status;
    onion_volume_seal_release(volume);
    if (status != ONION_E_CLOSED) {
        if (volume->seal.stage == ONION_SEAL_RELEASED) {
            onion_volume_put_back(volume, &volume->seal.batch);
            volume->seal.batch = (struct onion_dirty_records){0};
        }
        if (volume->seal.stage == ONION_SEAL_BEGUN)
            give_back_what_was_set_aside(volume);
        else
            undo_cut(volume);
        status = 0;
    }
    end(volume);
    return status;
}
