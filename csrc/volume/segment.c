/* segment.c: implements segment.h. */
#define _GNU_SOURCE
#include "volume/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "base/site.h"
#include "base/whole_io.h"

/* A growing segment is mapped beyond its end, and each time twice as far, so that not every write needs a new
 * mapping. */
#define MAP_AHEAD_BYTES (1ull << 20)

void onion_segment_rename(struct onion_segment *segment, const unsigned char *uuid) {
    static const char digits[] = "0123456789abcdef";
    char *name = strrchr(segment->path, '/') + 1;
    for (int i = 0; i < ONION_UUID_BYTES; i++) {
        name[2 * i] = digits[uuid[i] >> 4];
        name[2 * i + 1] = digits[uuid[i] & 15];
    }
    memcpy(segment->uuid, uuid, ONION_UUID_BYTES);
}

int onion_segment_new(const struct onion_store *store, const char *directory, const unsigned char *uuid,
                      uint32_t number, uint32_t block_shift, struct onion_segment **out) {
    struct onion_segment *segment = calloc(1, sizeof *segment);
    if (!segment)
        return -ENOMEM;
    if (asprintf(&segment->path, "%s/%0*d.seg", directory, 2 * ONION_UUID_BYTES, 0) < 0) {
        free(segment);
        return -ENOMEM;
    }
    onion_segment_rename(segment, uuid);
    segment->store = store;
    segment->number = number;
    segment->block_shift = block_shift;
    segment->fd = -1;
    pthread_mutex_init(&segment->mapping_lock, NULL);
    *out = segment;
    return 0;
}

static void mapping_release(void *context, void *object) {
    struct onion_mapping *mapping = object;
    (void)context;
    munmap(mapping->address, mapping->length);
    free(mapping);
}

void onion_segment_free(struct onion_segment *segment) {
    if (!segment)
        return;
    if (segment->mapping)
        mapping_release(NULL, segment->mapping);
    if (segment->fd >= 0)
        close(segment->fd);
    pthread_mutex_destroy(&segment->mapping_lock);
    free(segment->free_slots.items);
    free(segment->path);
    free(segment);
}

static int check_header(const struct onion_segment *segment, int fd) {
    unsigned char bytes[ONION_HEADER_BYTES];
    struct onion_header header;
    int status = onion_pread_all(fd, bytes, sizeof bytes, 0);
    if (status < 0)
        return status;
    status = onion_header_decode(bytes, sizeof bytes, ONION_MAGIC_SEGMENT, &header);
    if (status < 0)
        return status;
    if (memcmp(header.uuid, segment->uuid, ONION_UUID_BYTES) || header.block_size != 1u << segment->block_shift)
        return ONION_E_FORMAT;
    return 0;
}

int onion_segment_check(struct onion_segment *segment, uint64_t slots) {
    int fd = onion_open_file(segment->path, O_RDONLY);
    if (fd < 0)
        return onion_site_note(fd, segment->path, 0);
    struct stat info;
    uint64_t end = onion_slot_offset(segment->block_shift, slots);
    int status = fstat(fd, &info) ? -errno : check_header(segment, fd);
    close(fd);
    if (status < 0)
        return onion_site_note(status, segment->path, 0);
    if ((uint64_t)info.st_size < end)
        return onion_site_note(ONION_E_FORMAT, segment->path, (uint64_t)info.st_size);
    segment->created = 1;
    segment->next_slot = (uint32_t)slots;
    return 0;
}

int onion_segment_check_own(struct onion_segment *segment, uint64_t slots_named) {
    int fd = onion_open_file(segment->path, O_RDONLY);
    if (fd == -ENOENT && slots_named == 0)
        return 0;
    if (fd < 0)
        return onion_site_note(fd, segment->path, 0);
    struct stat info;
    int status = fstat(fd, &info) ? -errno : check_header(segment, fd);
    close(fd);
    if ((status == ONION_E_FORMAT || status == ONION_E_CHECKSUM) && slots_named == 0)
        return 0; /* it was made and not flushed before a crash, so nothing in it was ever promised */
    if (status == 0 && (uint64_t)info.st_size < onion_slot_offset(segment->block_shift, slots_named))
        return onion_site_note(ONION_E_FORMAT, segment->path, (uint64_t)info.st_size);
    if (status < 0)
        return onion_site_note(status, segment->path, 0);
    uint64_t slots = ((uint64_t)info.st_size - ONION_HEADER_BYTES) >> segment->block_shift;
    segment->created = 1;
    segment->next_slot = slots < ONION_SLOT_LAST ? (uint32_t)slots : ONION_SLOT_LAST;
    return 0;
}

static int write_header(struct onion_segment *segment, int fd) {
    unsigned char bytes[ONION_HEADER_BYTES];
    struct onion_header header = {
        .version = ONION_FORMAT_VERSION, .block_size = 1u << segment->block_shift, .compatible = segment->features};
    memcpy(header.uuid, segment->uuid, ONION_UUID_BYTES);
    onion_header_encode(&header, ONION_MAGIC_SEGMENT, bytes);
    return onion_pwrite_all(fd, bytes, sizeof bytes, 0);
}

/* Sets the descriptor before the flags, because a flush in another thread syncs a dirty segment by its descriptor. */
static void note_made(struct onion_segment *segment, int fd) {
    segment->fd = fd;
    __atomic_store_n(&segment->directory_dirty, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&segment->created, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&segment->dirty, 1, __ATOMIC_SEQ_CST);
}

int onion_segment_open_own(struct onion_segment *segment, uint64_t slots_named) {
    int fd = onion_open_file(segment->path, O_RDWR);
    if (fd < 0)
        return fd == -ENOENT && slots_named == 0 ? 0 : onion_site_note(fd, segment->path, 0);
    struct stat info;
    int status = fstat(fd, &info) ? -errno : check_header(segment, fd);
    int torn = status == ONION_E_FORMAT || status == ONION_E_CHECKSUM;
    if (torn && slots_named == 0) {
        /* A crash came before the first flush, so nothing in this file was ever promised. Its bytes are wiped later. */
        status = write_header(segment, fd);
        if (info.st_size < ONION_HEADER_BYTES)
            info.st_size = ONION_HEADER_BYTES;
        if (status == 0)
            note_made(segment, fd);
    }
    uint64_t slots = 0, fault = 0;
    if (status == 0) {
        uint64_t data = (uint64_t)info.st_size - ONION_HEADER_BYTES;
        slots = (data + (1ull << segment->block_shift) - 1) >> segment->block_shift;
        /* If the file does not hold a named slot in full, data was lost. */
        if (data >> segment->block_shift < slots_named || slots > ONION_SLOT_LAST) {
            status = ONION_E_FORMAT;
            fault = (uint64_t)info.st_size;
        }
    }
    if (status < 0) {
        close(fd);
        segment->fd = -1;
        return onion_site_note(status, segment->path, fault);
    }
    segment->fd = fd;
    segment->created = 1;
    segment->next_slot = (uint32_t)slots;
    return 0;
}

int onion_segment_create(struct onion_segment *segment) {
    int fd = onion_store_make_file(segment->store, segment->path);
    int status = fd < 0 ? fd : write_header(segment, fd);
    if (status < 0 && fd >= 0) {
        unlink(segment->path);
        close(fd);
    }
    if (status < 0)
        return onion_site_set(status, segment->path, 0);
    note_made(segment, fd);
    return 0;
}

uint64_t onion_segment_slots_in_file(const struct onion_segment *segment) {
    struct stat info;
    if (!__atomic_load_n(&segment->created, __ATOMIC_SEQ_CST))
        return 0;
    if (segment->fd < 0 || fstat(segment->fd, &info))
        return segment->next_slot;
    return ((uint64_t)info.st_size - ONION_HEADER_BYTES) >> segment->block_shift;
}

/* Maps enough for `end` bytes. The old mapping stays until the readers that may use it have left. */
static int map_until(struct onion_segment *segment, struct onion_epoch *epoch, uint64_t end) {
    uint64_t length = MAP_AHEAD_BYTES;
    if (!segment->own) {
        length = onion_slot_offset(segment->block_shift, segment->next_slot);
    } else {
        while (length < end)
            length *= 2;
    }
    if (length < end)
        return onion_site_set(-EIO, segment->path, length);
    (void)onion_fault_install(); /* another library may have replaced it; without it, a failing load ends the process */
    struct onion_mapping *mapping = malloc(sizeof *mapping);
    if (!mapping)
        return -ENOMEM;
    int fd = segment->fd >= 0 ? segment->fd : onion_store_open_file(segment->store, segment->path, O_RDONLY);
    int status = fd < 0 ? fd : 0;
    if (status == 0) {
        mapping->length = length;
        mapping->address = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);
        status = mapping->address == MAP_FAILED ? -errno : 0;
    }
    if (fd >= 0 && fd != segment->fd)
        close(fd);
    if (status < 0) {
        free(mapping);
        return onion_site_set(status, segment->path, end);
    }
    struct onion_mapping *old = segment->mapping;
    __atomic_store_n(&segment->mapping, mapping, __ATOMIC_RELEASE);
    if (old)
        onion_epoch_retire(epoch, mapping_release, NULL, old);
    return 0;
}

int onion_segment_address(struct onion_segment *segment, struct onion_epoch *epoch, uint32_t slot, uint64_t count,
                          const char **address) {
    uint64_t start = onion_slot_offset(segment->block_shift, slot);
    uint64_t end = start + (count << segment->block_shift);
    struct onion_mapping *mapping = __atomic_load_n(&segment->mapping, __ATOMIC_ACQUIRE);
    if (__builtin_expect(!mapping || mapping->length < end, 0)) {
        pthread_mutex_lock(&segment->mapping_lock);
        int status = 0;
        if (!segment->mapping || segment->mapping->length < end)
            status = map_until(segment, epoch, end);
        mapping = segment->mapping;
        pthread_mutex_unlock(&segment->mapping_lock);
        if (status < 0)
            return status;
    }
    *address = mapping->address + start;
    return 0;
}

int onion_segment_give_back(struct onion_segment *segment, uint32_t slot, uint32_t count) {
    struct onion_slots_list *list = &segment->free_slots;
    if (!count)
        return 0;
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 16;
        struct onion_slots *items = realloc(list->items, capacity * sizeof *items);
        if (!items)
            return -ENOMEM;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = (struct onion_slots){slot, count};
    return 0;
}

static struct onion_stream *oldest_stream(struct onion_segment *segment) {
    struct onion_stream *oldest = &segment->streams[0];
    for (int i = 1; i < ONION_STREAMS; i++)
        if (segment->streams[i].last_used < oldest->last_used)
            oldest = &segment->streams[i];
    return oldest;
}

static int64_t take_from_stream(struct onion_segment *segment, struct onion_stream *stream, uint64_t count,
                                uint32_t *slot) {
    uint64_t taken = count < stream->left ? count : stream->left;
    *slot = stream->next_slot;
    stream->next_block += taken;
    stream->next_slot += (uint32_t)taken;
    stream->left -= (uint32_t)taken;
    stream->last_used = ++segment->stream_clock;
    return (int64_t)taken;
}

static int64_t take_from_end(struct onion_segment *segment, uint64_t count, uint32_t *slot) {
    uint64_t left = ONION_SLOT_LAST - segment->next_slot;
    uint64_t taken = count < left ? count : left;
    if (!taken)
        return ONION_E_FULL_SEGMENT;
    *slot = segment->next_slot;
    segment->next_slot += (uint32_t)taken;
    return (int64_t)taken;
}

static int64_t take_from_free(struct onion_segment *segment, uint64_t count, uint32_t *slot) {
    struct onion_slots_list *list = &segment->free_slots;
    struct onion_slots *last = &list->items[list->count - 1];
    uint64_t taken = count < last->count ? count : last->count;
    *slot = last->slot;
    last->slot += (uint32_t)taken;
    last->count -= (uint32_t)taken;
    if (!last->count)
        list->count--;
    return (int64_t)taken;
}

int64_t onion_segment_take(struct onion_segment *segment, uint64_t block_index, uint64_t count,
                           uint32_t blocks_per_range, uint32_t *slot) {
    for (int i = 0; i < ONION_STREAMS; i++)
        if (segment->streams[i].left && segment->streams[i].next_block == block_index)
            return take_from_stream(segment, &segment->streams[i], count, slot);
    if (block_index % blocks_per_range == 0 && segment->next_slot < ONION_SLOT_LAST - blocks_per_range) {
        struct onion_stream *stream = oldest_stream(segment);
        onion_segment_give_back(segment, stream->next_slot, stream->left);
        stream->next_block = block_index;
        stream->left = (uint32_t)take_from_end(segment, blocks_per_range, &stream->next_slot);
        return take_from_stream(segment, stream, count, slot);
    }
    if (segment->free_slots.count)
        return take_from_free(segment, count, slot);
    return take_from_end(segment, count, slot);
}
