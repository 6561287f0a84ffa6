/* head_log.c: makes the file of a head's map log, and adds frames to it. See volume.h for what must hold, and flush.c
 * for the order of the steps. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/store_file.h"
#include "volume/internal.h"

#define LOG_STEP_BYTES 16384u /* a map log's file grows in steps of this size */

/* ---- the file ---- */

int onion_head_log_describe(struct onion_head_log *log, const char *map_path, const unsigned char *map_id) {
    *log = (struct onion_head_log){.fd = -1, .cursor = {.offset = ONION_HEADER_BYTES}};
    memcpy(log->map_id, map_id, ONION_UUID_BYTES);
    log->path = strdup(map_path);
    return log->path ? 0 : -ENOMEM;
}

int onion_head_log_create(struct onion_volume *volume, struct onion_head_log *log) {
    unsigned char bytes[LOG_STEP_BYTES] = {0};
    struct onion_header header = {.version = ONION_FORMAT_VERSION,
                                  .block_size = volume->block_size,
                                  .compatible = volume->wipe_zero ? ONION_FEATURE_WIPE_ZERO : 0};
    memcpy(header.uuid, log->map_id, ONION_UUID_BYTES);
    onion_header_encode(&header, ONION_MAGIC_MAP, bytes);
    int fd = onion_store_make_file(&volume->store, log->path);
    if (fd < 0)
        return fd;
    log->room_end = sizeof bytes;
    int status = onion_pwrite_all(fd, bytes, sizeof bytes, 0);
    if (onion_has_no_room(status)) {
        log->room_end = ONION_HEADER_BYTES;
        status = onion_pwrite_all(fd, bytes, ONION_HEADER_BYTES, 0);
    }
    if (status < 0) {
        unlink(log->path);
        close(fd);
        return status;
    }
    log->fd = fd;
    return 0;
}

int onion_head_log_begin(struct onion_volume *volume, struct onion_head_log *log) {
    int status = onion_head_log_create(volume, log);
    if (status < 0)
        return onion_site_set(status, log->path, 0);
    onion_start_writing(log->fd);
    log->is_new = 1;
    return 0;
}

/* The header is made durable before the first frame. So a bad header in front of frames is damage, not the trace of a
 * crash. */
int onion_head_log_sync_new(struct onion_volume *volume, struct onion_head_log *log) {
    const char *path = log->path;
    int status = onion_sync_file(log->fd); /* BARRIER: map header */
    if (status == 0) {
        path = volume->layers_directory;
        status = onion_sync_directory(volume->layers_directory); /* BARRIER: map name */
    }
    if (status == 0)
        log->is_new = 0;
    return onion_volume_poison_on(volume, onion_site_set(status, path, 0));
}

int onion_head_log_draw_salt(struct onion_head_log *log) {
    if (log->cursor.salt)
        return 0;
    while (log->cursor.salt == 0)
        /* A system call, because glibc has getrandom only from 2.25 on, and a wheel may run with 2.17. */
        if (syscall(SYS_getrandom, &log->cursor.salt, sizeof log->cursor.salt, 0) != sizeof log->cursor.salt &&
            errno != EINTR)
            return -errno;
    return 0;
}

void onion_head_log_close(struct onion_head_log *log) {
    if (log->fd >= 0)
        close(log->fd);
    free(log->path);
    *log = (struct onion_head_log){.fd = -1};
}

/* ---- the frames ---- */

/* Writes a frame at the end of the log. If it passes the end of the file, zeros for the next frames are written after
 * it. Frames that overwrite these zeros do not change the file's size, so their sync needs no commit of the file
 * system's journal. Zeros are no frame, so a reader of the log finds its end there. If the disk has no room for the
 * zeros, it may still have room for the frame. */
static int write_frame(struct onion_head_log *log, const unsigned char *bytes, size_t length, size_t with_room) {
    uint64_t end = log->cursor.offset + length;
    if (end <= log->room_end)
        return onion_pwrite_all(log->fd, bytes, length, log->cursor.offset);
    int status = onion_pwrite_all(log->fd, bytes, with_room, log->cursor.offset);
    if (status == 0)
        log->room_end = log->cursor.offset + with_room;
    else if (onion_has_no_room(status))
        status = onion_pwrite_all(log->fd, bytes, length, log->cursor.offset);
    return status;
}

int onion_head_log_append(struct onion_head_log *log, const struct onion_record *records, uint32_t count) {
    size_t length = onion_frame_bytes(count);
    uint64_t end = log->cursor.offset + length;
    size_t with_room = (size_t)((end / LOG_STEP_BYTES + 1) * LOG_STEP_BYTES - log->cursor.offset);
    unsigned char *bytes = malloc(with_room);
    if (!bytes)
        return -ENOMEM;
    memset(bytes + length, 0, with_room - length);
    uint32_t crc =
        onion_frame_encode(records, count, log->cursor.sequence + 1, log->cursor.salt, log->cursor.crc, bytes);
    int status = write_frame(log, bytes, length, with_room);
    free(bytes);
    if (status < 0)
        return onion_site_set(status, log->path, log->cursor.offset);
    log->cursor.offset += length;
    log->cursor.sequence++;
    log->cursor.crc = crc;
    log->record_count += count;
    return 0;
}

void onion_volume_note_log_bytes(struct onion_volume *volume, const struct onion_head_log *log) {
    __atomic_store_n(&volume->log_bytes, log->cursor.offset, __ATOMIC_RELAXED);
}

/* ---- the state that dirty records go on from ---- */

struct onion_journal_owner onion_head_log_owner(const struct onion_head_log *log) {
    struct onion_journal_owner owner = {.frames = log->cursor.sequence, .crc = log->cursor.crc};
    memcpy(owner.map_id, log->map_id, ONION_UUID_BYTES);
    return owner;
}

void onion_volume_resolve_owner(struct onion_volume *volume) {
    pthread_mutex_lock(&volume->dirty_lock);
    onion_journal_resolve_owner(volume, volume->log.map_id);
    pthread_mutex_unlock(&volume->dirty_lock);
}
