/* read.c: reads a volume, and maps a view. See volume.h for what must hold. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "base/store_file.h"
#include "volume/internal.h"

#define PAGE_BYTES 4096u
#define BATCH 32 /* blocks whose look-ups and loads overlap */

struct read_request {
    struct onion_volume *volume;
    uint64_t offset, length;
    char *out;
    const uint64_t *block_indices;
    uint64_t count;
};

static void guarded_copy(void *out, const void *from, size_t length) {
    onion_fault_watch(from, length);
    memcpy(out, from, length);
    onion_fault_unwatch();
}

/* Copies bytes of the base from a disk offset on, and zeros past the base's end. */
static void read_base(const struct onion_volume *volume, uint64_t offset, uint64_t length, char *out) {
    const struct onion_mapping *base = __atomic_load_n(&volume->base, __ATOMIC_ACQUIRE);
    uint64_t size = base ? base->length : 0;
    uint64_t present = offset >= size ? 0 : (size - offset < length ? size - offset : length);
    if (present)
        guarded_copy(out, base->address + offset, present);
    memset(out + present, 0, length - present);
}

static int read_range(void *context) {
    struct read_request *request = context;
    struct onion_volume *volume = request->volume;
    while (request->length) {
        struct onion_source source;
        const char *address;
        onion_volume_next_run(volume, request->offset, request->length, &source);
        int status = onion_source_address(&source, &volume->epoch, &address);
        if (status < 0)
            return status;
        if (address)
            guarded_copy(request->out, address, source.length);
        else
            memset(request->out, 0, source.length);
        request->offset += source.length;
        request->out += source.length;
        request->length -= source.length;
    }
    return 0;
}

static __attribute__((noinline, cold)) int note_base_fault(int status, const struct onion_mapping *base,
                                                           uint64_t offset) {
    char path[4096], link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", base->fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return onion_site_set(status, path, offset);
}

/* Notes the file whose mapping a load failed in. The reader's ticket keeps the mappings. */
static __attribute__((noinline, cold)) void note_failed_load(struct onion_volume *volume) {
    const char *address = onion_fault_address(); /* NULL: no load failed, it was another error */
    const struct onion_mapping *base = __atomic_load_n(&volume->base, __ATOMIC_ACQUIRE);
    uint32_t count = __atomic_load_n(&volume->segment_count, __ATOMIC_ACQUIRE);
    for (uint32_t i = 1; i <= count; i++) {
        const struct onion_segment *segment = __atomic_load_n(&volume->segments[i], __ATOMIC_ACQUIRE);
        const struct onion_mapping *mapping = __atomic_load_n(&segment->mapping, __ATOMIC_ACQUIRE);
        if (mapping && address >= mapping->address && address < mapping->address + mapping->length)
            onion_site_set(-EIO, segment->path, (uint64_t)(address - mapping->address));
    }
    if (base && address >= base->address && address < base->address + base->length)
        note_base_fault(-EIO, base, (uint64_t)(address - base->address));
}

/* Runs `work` as a reader. It checks after entering whether the volume is closed, because a close waits for the readers
 * that have entered. */
static int as_reader(struct onion_volume *volume, int (*work)(void *), void *context) {
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    int status = onion_volume_usable(volume);
    if (status == 0)
        status = onion_fault_run(work, context);
    if (__builtin_expect(status == -EIO, 0))
        note_failed_load(volume);
    onion_epoch_leave(&volume->epoch, ticket);
    return status;
}

int onion_volume_read_unbounded(struct onion_volume *volume, uint64_t offset, uint64_t length, void *out) {
    struct read_request request = {.volume = volume, .offset = offset, .length = length, .out = out};
    return as_reader(volume, read_range, &request);
}

int onion_volume_read(struct onion_volume *volume, uint64_t offset, uint64_t length, void *out) {
    int status = onion_volume_usable(volume);
    if (status < 0)
        return status;
    if (!onion_volume_in_bounds(volume, offset, length))
        return ONION_E_BOUNDS;
    return onion_volume_read_unbounded(volume, offset, length, out);
}

static int read_batch(struct onion_volume *volume, const uint64_t *block_indices, size_t count, char *out) {
    onion_location locations[BATCH];
    const char *addresses[BATCH];
    onion_map_lookup_many(&volume->index, block_indices, count, locations);
    for (size_t i = 0; i < count; i++) {
        addresses[i] = NULL;
        if (onion_location_is_data(locations[i])) {
            int status = onion_segment_address(volume->segments[onion_location_segment(locations[i])], &volume->epoch,
                                               onion_location_slot(locations[i]), 1, &addresses[i]);
            if (status < 0)
                return status;
        } else if (locations[i] == ONION_LOCATION_HOLE) {
            const struct onion_mapping *base = __atomic_load_n(&volume->base, __ATOMIC_ACQUIRE);
            uint64_t offset = block_indices[i] << volume->block_shift;
            if (base && offset + volume->block_size <= base->length)
                addresses[i] = base->address + offset;
        }
        __builtin_prefetch(addresses[i]);
    }
    for (size_t i = 0; i < count; i++, out += volume->block_size) {
        if (addresses[i])
            guarded_copy(out, addresses[i], volume->block_size);
        else if (locations[i] == ONION_LOCATION_HOLE)
            read_base(volume, block_indices[i] << volume->block_shift, volume->block_size, out);
        else
            memset(out, 0, volume->block_size);
    }
    return 0;
}

static int read_many(void *context) {
    struct read_request *request = context;
    struct onion_volume *volume = request->volume;
    uint64_t size = onion_volume_size(volume), whole = size >> volume->block_shift;
    for (uint64_t i = 0; i < request->count; i += BATCH) {
        size_t count = request->count - i < BATCH ? request->count - i : BATCH;
        char *out = request->out + (i << volume->block_shift);
        int status = read_batch(volume, request->block_indices + i, count, out);
        if (status < 0)
            return status;
        for (size_t k = 0; k < count; k++)
            if (request->block_indices[i + k] >= whole) {
                uint64_t tail = size & (volume->block_size - 1);
                memset(out + (k << volume->block_shift) + tail, 0, volume->block_size - tail);
            }
    }
    return 0;
}

int onion_volume_read_blocks(struct onion_volume *volume, const uint64_t *block_indices, uint64_t count, void *out) {
    int status = onion_volume_usable(volume);
    if (status < 0)
        return status;
    if (!onion_volume_has_blocks(volume, block_indices, count))
        return ONION_E_BOUNDS;
    struct read_request request = {.volume = volume, .out = out, .block_indices = block_indices, .count = count};
    return as_reader(volume, read_many, &request);
}

/* ---- a view's own mapping ---- */

static int map_data(struct onion_volume *volume, const struct onion_source *source, char *at) {
    const char *path = source->segment->path;
    uint64_t file_offset = onion_slot_offset(volume->block_shift, source->slot) + source->offset;
    int fd = onion_store_open_file(&volume->store, path, O_RDONLY);
    if (fd < 0)
        return onion_site_set(fd, path, 0);
    void *got = mmap(at, source->length, PROT_READ, MAP_SHARED | MAP_FIXED, fd, (off_t)file_offset);
    int status = got == MAP_FAILED ? -errno : 0;
    close(fd);
    return onion_site_set(status, path, file_offset);
}

/* Maps a part of the base at `at`. mremap with an old size of 0 makes a second mapping of the same pages. */
static int map_base(const struct onion_source *source, char *at) {
    uint64_t pages = (source->length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    void *got = mremap(source->base->address + source->offset, 0, pages, MREMAP_MAYMOVE | MREMAP_FIXED, at);
    return got == MAP_FAILED ? note_base_fault(-errno, source->base, source->offset) : 0;
}

static int map_pieces(struct onion_volume *volume, uint64_t offset, uint64_t length, uint64_t run_max, char *at,
                      uint64_t *pieces) {
    int status = 0;
    while (length && status == 0) {
        struct onion_source source;
        onion_volume_next_run(volume, offset, length, &source);
        /* Zeros after the base that begin inside a page lie in the base's last page, so they need no mapping. */
        if (offset % PAGE_BYTES == 0) {
            if (*pieces == run_max || onion_mappings_take(1) < 0)
                return -E2BIG;
            ++*pieces;
        }
        if (source.kind == ONION_SOURCE_DATA)
            status = map_data(volume, &source, at);
        else if (source.kind == ONION_SOURCE_BASE)
            status = map_base(&source, at);
        /* otherwise the anonymous pages that are there read zero */
        offset += source.length, at += source.length, length -= source.length;
    }
    return status;
}

void onion_mapped_range_free(void *address, uint64_t mapped_length, uint64_t pieces) {
    munmap(address, mapped_length);
    onion_mappings_give_back(pieces);
}

int onion_volume_map_range(struct onion_volume *volume, uint64_t offset, uint64_t length, uint64_t run_max,
                           void **address, uint64_t *mapped_length, uint64_t *pieces) {
    int status = onion_volume_usable(volume);
    if (status == 0 && volume->writable)
        status = ONION_E_READ_ONLY;
    if (status == 0 && !onion_volume_in_bounds(volume, offset, length))
        status = ONION_E_BOUNDS;
    if (status < 0)
        return status;
    uint64_t block = offset >> volume->block_shift;
    uint64_t end = (offset + length + volume->block_size - 1) >> volume->block_shift;
    *mapped_length = (end - block) << volume->block_shift;
    struct onion_ticket ticket = onion_epoch_enter(&volume->epoch);
    status = onion_volume_usable(volume); /* it may have been closed since */
    char *at = MAP_FAILED;
    *pieces = 0;
    if (status == 0) {
        at = mmap(NULL, *mapped_length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        status = at == MAP_FAILED
                     ? -errno
                     : map_pieces(volume, block << volume->block_shift, *mapped_length, run_max, at, pieces);
    }
    onion_epoch_leave(&volume->epoch, ticket);
    if (status < 0 && at != MAP_FAILED)
        onion_mapped_range_free(at, *mapped_length, *pieces);
    *address = at;
    return status;
}
