/* fuzz_opening.c: any bytes as the map files of a sealed layer and of the head over it, beside segments that are sound.
 *
 * The first bytes say whether the maps are taken as they are, or made of frames that hold, so that more than CRCs is
 * tried; and what there is below. What opens must read everywhere, take writes, and read the same when it is opened
 * again. The files are in memory: /dev/shm. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "volume/segment.h"
#include "volume/volume.h"

enum { BLOCK = 4096, BLOCKS = 700, SLOTS = 40, RECORD_INPUT_BYTES = 8, MAP_BYTES_MAX = 1 << 16 };

static char directory[64], sealed_path[128], head_path[128];
static const unsigned char sealed_map[16] = "sealed map", head_map[16] = "head map";
static const unsigned char sealed_segment[16] = "sealed segment", own_segment[1][16] = {"own segment"},
                           spare[16] = "spare";

static void check(int holds) {
    if (!holds)
        abort();
}

static void put_file(const char *path, const void *bytes, size_t length) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    check(fd >= 0 && write(fd, bytes, length) == (ssize_t)length);
    close(fd);
}

static void segment_path(char *out, size_t room, const unsigned char *id) {
    int used = snprintf(out, room, "%s/", directory);
    for (int i = 0; i < 16; i++)
        used += snprintf(out + used, room - (size_t)used, "%02x", id[i]);
    snprintf(out + used, room - (size_t)used, ".seg");
}

/* A segment with all slots, each filled with its number. */
static void put_segment(const unsigned char *id) {
    static unsigned char bytes[ONION_HEADER_BYTES + SLOTS * BLOCK];
    struct onion_header header = {.version = ONION_FORMAT_VERSION, .block_size = BLOCK};
    char path[128];
    memcpy(header.uuid, id, 16);
    onion_header_encode(&header, ONION_MAGIC_SEGMENT, bytes);
    for (int slot = 0; slot < SLOTS; slot++)
        memset(bytes + ONION_HEADER_BYTES + slot * BLOCK, slot + 1, BLOCK);
    segment_path(path, sizeof path, id);
    put_file(path, bytes, sizeof bytes);
}

/* Records of 8 bytes each, as frames that hold. Returns the length; *frames and *crc are what a catalog says. */
static size_t make_map(const uint8_t *data, size_t size, const unsigned char *id, unsigned char *out, uint64_t *frames,
                       uint32_t *crc) {
    struct onion_header header = {.version = ONION_FORMAT_VERSION, .block_size = BLOCK};
    struct onion_record records[4];
    size_t length = ONION_HEADER_BYTES;
    memcpy(header.uuid, id, 16);
    onion_header_encode(&header, ONION_MAGIC_MAP, out);
    while (size >= RECORD_INPUT_BYTES && length + onion_frame_bytes(4) < MAP_BYTES_MAX) {
        uint32_t count = 0;
        for (; count < 4 && size >= RECORD_INPUT_BYTES;
             count++, data += RECORD_INPUT_BYTES, size -= RECORD_INPUT_BYTES) {
            struct onion_record *record = &records[count];
            *record = (struct onion_record){.kind = 1 + data[0] % 6, .block_count = data[1]};
            record->block_index = (uint64_t)data[2] << 8 | data[3];
            if (record->kind == ONION_RECORD_DATA)
                record->slot = data[4], record->segment = data[5];
            if (record->kind == ONION_RECORD_SEGMENT)
                *record = onion_record_segment(data[5], data[1] & 1 ? sealed_segment : own_segment[0]);
            if (record->kind == ONION_RECORD_SIZE)
                record->block_count = data[1] == 255, record->block_index <<= data[6] % 48;
        }
        *crc = onion_frame_encode(records, count, ++*frames, 7, *crc, out + length);
        length += onion_frame_bytes(count);
    }
    return length;
}

static struct onion_volume *open_all(const struct onion_layer_source *layer, int base_below) {
    const struct onion_head_source head = {.map_path = head_path, .own = own_segment, .own_count = 1};
    struct onion_head_source source = head;
    struct onion_volume *volume;
    memcpy(source.map_id, head_map, 16);
    memcpy(source.spare, spare, 16);
    check(onion_volume_new(BLOCK, BLOCKS * BLOCK, directory, directory, 0, 1, &volume) == 0);
    char base[128];
    segment_path(base, sizeof base, sealed_segment); /* any file will do */
    int fd = base_below ? open(base, O_RDONLY | O_CLOEXEC) : -1;
    int status = fd >= 0 ? onion_volume_set_base(volume, fd, SLOTS * BLOCK, 0) : 0;
    if (fd >= 0)
        close(fd);
    if (status == 0 && layer)
        status = onion_volume_add_layer(volume, layer);
    if (status == 0)
        status = onion_volume_open_head(volume, &source);
    if (status == 0)
        status = onion_volume_free_own_slots(volume);
    if (status < 0) {
        onion_volume_close(volume);
        onion_volume_free(volume);
        return NULL;
    }
    return volume;
}

static void close_all(struct onion_volume *volume) {
    onion_volume_close(volume);
    onion_volume_free(volume);
}

/* The first blocks and the last, which is all that a log of this size can have changed. */
static uint64_t read_some(struct onion_volume *volume, unsigned char *out) {
    uint64_t size = onion_volume_size(volume), length = size < BLOCKS * BLOCK ? size : BLOCKS * BLOCK;
    check(onion_volume_read(volume, 0, length, out) == 0);
    check(onion_volume_read(volume, size - (size != 0), size != 0, out + length) == 0);
    return length + 1;
}

static void use(const struct onion_layer_source *layer, int base_below) {
    static unsigned char before[BLOCKS * BLOCK + 1], after[BLOCKS * BLOCK + 1];
    struct onion_volume *volume = open_all(layer, base_below);
    if (!volume)
        return;
    uint64_t size = onion_volume_size(volume);
    read_some(volume, before);
    if (size >= 3 * BLOCK) {
        check(onion_volume_write(volume, 100, 2 * BLOCK, before) == 0);
        check(onion_volume_zero(volume, BLOCK, BLOCK) == 0);
    }
    check(onion_volume_flush(volume) == 0);
    uint64_t length = read_some(volume, before);
    close_all(volume);
    volume = open_all(layer, base_below);
    check(volume != NULL && onion_volume_size(volume) == size);
    check(read_some(volume, after) == length && memcmp(before, after, length) == 0);
    close_all(volume);
}

static void remove_directory(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    check(system(command) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static unsigned char map[MAP_BYTES_MAX];
    if (!directory[0]) {
        snprintf(directory, sizeof directory, "/dev/shm/fuzz_opening.XXXXXX");
        check(mkdtemp(directory) != NULL);
        atexit(remove_directory);
        snprintf(sealed_path, sizeof sealed_path, "%s/sealed.map", directory);
        snprintf(head_path, sizeof head_path, "%s/head.map", directory);
    }
    if (size < 3 || size > MAP_BYTES_MAX)
        return 0;
    struct onion_segment_ref segment = {.slots = SLOTS};
    struct onion_layer_source layer = {.map_path = sealed_path, .segments = &segment, .segment_count = 1};
    memcpy(segment.uuid, sealed_segment, 16);
    memcpy(layer.map_id, sealed_map, 16);
    put_segment(sealed_segment);
    put_segment(own_segment[0]);
    int made = data[0] & 1, layered = data[0] & 2;
    size_t half = 3 + (size - 3) * data[1] / 256;
    uint64_t frames = 0;
    if (layered) {
        size_t length =
            made ? make_map(data + 3, half - 3, sealed_map, map, &layer.map_frames, &layer.map_crc) : half - 3;
        put_file(sealed_path, made ? map : data + 3, length);
        layer.map_length = length;
    }
    uint32_t crc = 0;
    size_t length = made ? make_map(data + half, size - half, head_map, map, &frames, &crc) : size - half;
    if (made && length > ONION_HEADER_BYTES && data[0] & 8)
        length -= data[2] % (length - ONION_HEADER_BYTES); /* torn */
    put_file(head_path, made ? map : data + half, length);
    use(layered ? &layer : NULL, data[0] & 4);
    unlink(sealed_path);
    unlink(head_path);
    return 0;
}
