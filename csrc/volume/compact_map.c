/* compact_map.c: writes a head's map anew as a compact log, and decides when this is worthwhile. See volume.h for what
 * must hold. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bulk/wipe.h"
#include "layer/layer_map.h"
#include "volume/internal.h"

#define REWRITE_FRAME_RECORDS (1u << 17)
#define COMPACT_MAP_BYTES_MIN (512u << 10) /* a log shorter than this is not written anew */

static int number_of_id(struct onion_layer *layer, const unsigned char *uuid, uint16_t *number) {
    for (uint32_t k = 0; k < layer->segment_count; k++)
        if (!memcmp(layer->segment_ids[k], uuid, ONION_UUID_BYTES)) {
            *number = (uint16_t)(k + 1);
            return 0;
        }
    if (layer->segment_count == ONION_SEGMENT_LAST)
        return -EMFILE;
    unsigned char(*ids)[ONION_UUID_BYTES] =
        realloc(layer->segment_ids, (layer->segment_count + 1) * sizeof *layer->segment_ids);
    if (!ids)
        return -ENOMEM;
    layer->segment_ids = ids;
    layer->segment_capacity = layer->segment_count + 1;
    memcpy(ids[layer->segment_count++], uuid, ONION_UUID_BYTES);
    *number = (uint16_t)layer->segment_count;
    return 0;
}

/* Lays `upper` over `lower`. */
static int fold_layers(struct onion_layer *lower, const struct onion_layer *upper) {
    uint16_t *numbers = calloc(upper->segment_count + 1, sizeof *numbers);
    int status = numbers ? 0 : -ENOMEM;
    for (uint32_t k = 0; k < upper->segment_count && status == 0; k++)
        status = number_of_id(lower, upper->segment_ids[k], &numbers[k + 1]);
    if (status == 0)
        status = onion_map_fold(&lower->map, &upper->map, numbers);
    free(numbers);
    return status;
}

/* Loads into *layer the head's durable map, folded over `lower`. */
static int load_folded_map(struct onion_volume *volume, const struct onion_layer_source *lower,
                           struct onion_layer *layer) {
    const struct onion_head_log *log = &volume->log;
    struct onion_layer_source durable = {.map_path = log->path,
                                         .map_length = log->cursor.offset,
                                         .map_frames = log->cursor.sequence,
                                         .map_crc = log->cursor.crc};
    struct onion_layer head = {0};
    memcpy(durable.map_id, log->map_id, ONION_UUID_BYTES);
    int status = onion_layer_init(layer, volume->index.block_count, volume->block_shift);
    if (status == 0)
        status = onion_layer_init(&head, volume->index.block_count, volume->block_shift);
    if (status == 0 && lower && lower->map_length)
        status = onion_volume_load_sealed_map(volume, lower, layer);
    if (status == 0 && log->fd >= 0)
        status = onion_volume_load_sealed_map(volume, &durable, &head);
    if (status == 0)
        status = onion_layer_grow(layer, head.map.block_count);
    if (status == 0)
        status = fold_layers(layer, &head);
    onion_layer_destroy(&head);
    return status;
}

static int write_compact_map(struct onion_volume *volume, const struct onion_layer *layer, struct onion_head_log *log) {
    struct onion_layer_writer *writer = calloc(1, sizeof *writer);
    struct onion_record *records = malloc(REWRITE_FRAME_RECORDS * sizeof *records);
    int status = writer && records ? onion_head_log_draw_salt(log) : -ENOMEM;
    struct onion_record size = {.kind = ONION_RECORD_SIZE, .block_index = volume->size_bytes};
    if (status == 0)
        status = onion_head_log_append(log, &size, 1);
    uint32_t count;
    while (status == 0 && (count = onion_layer_records(layer, writer, records, REWRITE_FRAME_RECORDS)))
        status = onion_head_log_append(log, records, count);
    if (status == 0) {
        log->numbers_given = writer->numbers_given;
        for (uint32_t k = 1; k <= layer->segment_count; k++) {
            uint32_t number = onion_volume_find_segment(volume, layer->segment_ids[k - 1]);
            if (number)
                volume->next_numbers[number] = writer->number_of[k];
        }
        status = onion_sync_file(log->fd); /* BARRIER: rewritten map */
        onion_site_set(status, log->path, 0);
    }
    free(writer);
    free(records);
    return status;
}

/* Removes a map that will not be used. With policy `zero`, its bytes are wiped first. */
static void drop_staged_map(struct onion_volume *volume, struct onion_head_log *log) {
    struct onion_byte_range all = {0};
    struct onion_wipe_result result;
    struct stat info;
    if (log->fd < 0)
        return;
    all.length = fstat(log->fd, &info) ? 0 : (uint64_t)info.st_size;
    if (volume->wipe_zero && all.length) /* a failed sync is ignored here, because nothing in this file was promised */
        (void)onion_wipe(log->fd, &all, 1, ONION_WIPE_ZERO, 1, &result, NULL, NULL);
    unlink(log->path);
}

static int write_rewritten(struct onion_volume *volume, const struct onion_layer *layer) {
    struct onion_head_log *log = &volume->next_log;
    free(volume->next_numbers);
    volume->next_numbers = calloc(ONION_SEGMENT_LAST + 1, sizeof *volume->next_numbers);
    if (!volume->next_numbers)
        return -ENOMEM;
    int status = onion_site_set(onion_head_log_create(volume, log), log->path, 0);
    if (status == 0)
        status = write_compact_map(volume, layer, log);
    if (status == 0) {
        status = onion_sync_directory(volume->layers_directory); /* BARRIER: rewritten map name */
        onion_site_set(status, volume->layers_directory, 0);
    }
    if (status < 0)
        drop_staged_map(volume, log);
    return status;
}

int onion_volume_rewrite(struct onion_volume *volume, const char *new_path, const unsigned char *new_id,
                         const struct onion_layer_source *lower, int drop_zero, struct onion_sealed *written) {
    struct onion_layer layer = {0};
    int status = onion_volume_close_flush_gate(volume);
    if (status < 0)
        return status;
    status = onion_volume_flush_behind_gate(volume);
    if (status == 0)
        status = onion_head_log_describe(&volume->next_log, new_path, new_id);
    if (status == 0)
        status = load_folded_map(volume, lower, &layer);
    if (status == 0 && drop_zero)
        status = onion_layer_drop_zero(&layer);
    if (status == 0)
        status = write_rewritten(volume, &layer);
    onion_layer_destroy(&layer);
    if (status < 0) {
        onion_head_log_close(&volume->next_log);
        onion_volume_open_flush_gate(volume);
        return status;
    }
    *written = (struct onion_sealed){volume->next_log.cursor.offset, volume->next_log.cursor.sequence,
                                     volume->next_log.cursor.crc, volume->size_bytes};
    struct onion_journal_owner owner = onion_head_log_owner(&volume->next_log);
    pthread_mutex_lock(&volume->dirty_lock);
    onion_journal_add_owner(volume, &owner);
    pthread_mutex_unlock(&volume->dirty_lock);
    onion_volume_keep_flush_gate(volume, &volume->rewriting, 1 + (drop_zero != 0));
    return 0;
}

int onion_volume_rewrite_commit(struct onion_volume *volume) {
    if (!volume->rewriting)
        return -EINVAL;
    int status = onion_volume_usable(volume);
    if (status != ONION_E_CLOSED && status != ONION_E_FORKED) {
        pthread_rwlock_wrlock(&volume->gate);
        onion_head_log_close(&volume->log);
        volume->log = volume->next_log;
        volume->next_log = (struct onion_head_log){.fd = -1};
        for (uint32_t i = 1; i <= volume->segment_count; i++) {
            struct onion_segment *segment = volume->segments[i];
            segment->log_number = volume->next_numbers[i];
            if (segment->log_number)
                segment->generation = volume->generation; /* it is inherited now, unless the head had it already */
        }
        if (volume->rewriting == 2)
            volume->nothing_below = 1;
        onion_volume_resolve_owner(volume);
        onion_volume_note_log_bytes(volume, &volume->log);
        pthread_rwlock_unlock(&volume->gate);
        status = 0;
    }
    onion_volume_open_flush_gate(volume);
    return status;
}

int onion_volume_rewrite_abort(struct onion_volume *volume) {
    if (!volume->rewriting)
        return -EINVAL;
    if (onion_volume_usable(volume) != ONION_E_FORKED)
        onion_volume_resolve_owner(volume);
    drop_staged_map(volume, &volume->next_log);
    onion_head_log_close(&volume->next_log);
    onion_volume_open_flush_gate(volume);
    return 0;
}

int onion_volume_log_records(struct onion_volume *volume, uint64_t *records, uint64_t *needed) {
    int status = onion_volume_close_flush_gate(volume); /* so that the log and the head do not change */
    if (status < 0)
        return status;
    *records = (volume->log.cursor.offset - ONION_HEADER_BYTES) / ONION_RECORD_BYTES;
    *needed = 0;
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    uint64_t at = 0;
    struct onion_run run;
    while (*records && onion_map_next(&volume->index, at, volume->index.block_count, &run)) {
        at = run.block_index + run.block_count;
        *needed += !onion_location_is_data(run.location) ||
                   onion_segment_is_head(volume, volume->segments[onion_location_segment(run.location)]);
    }
    onion_epoch_leave(&volume->epoch, ticket);
    onion_volume_open_flush_gate(volume);
    return 0;
}

int onion_volume_log_state(struct onion_volume *volume, struct onion_sealed *state) {
    int status = onion_volume_close_flush_gate(volume); /* so that the log does not change */
    if (status < 0)
        return status;
    *state = (struct onion_sealed){volume->log.cursor.sequence ? volume->log.cursor.offset : 0,
                                   volume->log.cursor.sequence, volume->log.cursor.crc, volume->size_bytes};
    onion_volume_open_flush_gate(volume);
    return 0;
}

int onion_volume_may_want_compact_map(const struct onion_volume *volume) {
    return __atomic_load_n(&volume->log_bytes, __ATOMIC_RELAXED) >
           __atomic_load_n(&volume->compact_map_at, __ATOMIC_RELAXED);
}

int onion_volume_wants_compact_map(struct onion_volume *volume) {
    uint64_t records, needed;
    if (!onion_volume_may_want_compact_map(volume))
        return 0;
    int status = onion_volume_log_records(volume, &records, &needed);
    if (status < 0)
        return status;
    uint64_t bytes = records * ONION_RECORD_BYTES, most = 2 * needed * ONION_RECORD_BYTES + COMPACT_MAP_BYTES_MIN;
    if (bytes > most)
        return 1;
    /* Count again when the log has grown by an eighth, because fewer records may be needed by then. */
    uint64_t next = bytes + (bytes / 8 > COMPACT_MAP_BYTES_MIN / 2 ? bytes / 8 : COMPACT_MAP_BYTES_MIN / 2);
    __atomic_store_n(&volume->compact_map_at, next < most ? next : most, __ATOMIC_RELAXED);
    return 0;
}
