/* seal.c: a snapshot: the head becomes a sealed layer, and the next one begins, whose files may be made beforehand. See
 * volume.h for what must hold. */
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
    if (spare && memcmp(spare->uuid, map_id, ONION_UUID_BYTES))
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

static int seal_locked(struct onion_volume *volume, struct onion_sealed *sealed) {
    /* First with writers at work, so that what is left behind the barrier is small. */
    int status = onion_volume_flush_behind_gate(volume);
    if (status < 0)
        return status;
    pthread_rwlock_wrlock(&volume->gate);
    struct onion_dirty_records batch = onion_volume_take_dirty_records(volume, &volume->next_log);
    sealed->size_bytes = volume->size_bytes;
    swap_heads(volume);
    pthread_rwlock_unlock(&volume->gate);
    status = onion_volume_commit_batch(volume, &volume->log, &batch, 1);
    if (status < 0) {
        unswap_heads(volume);
        onion_volume_resolve_owner(volume);
        return status;
    }
    sealed->map_length = volume->log.cursor.sequence ? volume->log.cursor.offset : 0;
    sealed->map_frames = volume->log.cursor.sequence;
    sealed->map_crc = volume->log.cursor.crc;
    return 0;
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
    return onion_segment_new(volume->segments_directory, no_id, 0, volume->block_shift, &volume->next_spare);
}

int onion_volume_seal(struct onion_volume *volume, const char *map_path, const unsigned char *map_id,
                      struct onion_sealed *sealed) {
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    (void)onion_fault_install();               /* see base/sigbus.h */
    pthread_mutex_lock(&volume->prepare_lock); /* until the spare is taken */
    status = volume->spare ? make_room_for_spare(volume) : -EBUSY;
    if (status == 0)
        status = take_next_log(volume, map_path, map_id);
    if (status == 0)
        status = seal_locked(volume, sealed);
    if (status < 0)
        give_next_log_back(volume);
    pthread_mutex_unlock(&volume->prepare_lock);
    if (status < 0) {
        onion_volume_open_flush_gate(volume);
        return status;
    }
    onion_volume_keep_flush_gate(volume, &volume->sealing, 1);
    return 0;
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

int onion_volume_seal_commit(struct onion_volume *volume, const unsigned char *next_spare) {
    if (!volume->sealing)
        return -EINVAL;
    int status = onion_volume_usable(volume);
    if (status != ONION_E_CLOSED && status != ONION_E_FORKED) {
        onion_head_log_close(&volume->log);
        volume->log = volume->next_log;
        volume->next_log = (struct onion_head_log){.fd = -1};
        onion_volume_resolve_owner(volume);
        onion_volume_note_log_bytes(volume, &volume->log);
        close_sealed_segments(volume);
        status = onion_volume_set_spare(volume, next_spare);
    }
    onion_volume_open_flush_gate(volume);
    return status;
}

int onion_volume_seal_abort(struct onion_volume *volume) {
    if (!volume->sealing)
        return -EINVAL;
    int status = onion_volume_usable(volume);
    if (status != ONION_E_CLOSED && status != ONION_E_FORKED) {
        unswap_heads(volume);
        onion_volume_resolve_owner(volume);
        onion_head_log_close(&volume->next_log);
        status = 0;
    }
    onion_volume_open_flush_gate(volume);
    return status;
}
