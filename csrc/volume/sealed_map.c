/* sealed_map.c: reads the map file of a sealed layer, and checks it against what the source says. See volume.h for what
 * must hold. */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/store_file.h"
#include "layer/layer_map.h"
#include "volume/internal.h"

int onion_volume_check_map_header(const struct onion_volume *volume, const unsigned char *map_id,
                                  const struct onion_map_bytes *map) {
    struct onion_header header;
    int status = onion_header_decode(map->bytes, map->length, ONION_MAGIC_MAP, &header);
    if (status == 0 && (header.block_size != volume->block_size || memcmp(header.uuid, map_id, ONION_UUID_BYTES)))
        status = ONION_E_FORMAT;
    return status;
}

int onion_volume_read_sealed_map(const struct onion_volume *volume, const struct onion_layer_source *source,
                                 struct onion_map_bytes *map, uint64_t *fault) {
    int fd = onion_open_file(source->map_path, O_RDONLY);
    int status = fd < 0 ? fd : onion_map_bytes_read_sealed(fd, source->map_length, map, fault);
    if (fd >= 0)
        close(fd);
    return status < 0 ? status : onion_volume_check_map_header(volume, source->map_id, map);
}

int onion_volume_check_sealed_end(const struct onion_layer_source *source, const struct onion_log_cursor *end,
                                  int status) {
    if (status == ONION_E_TORN)
        return ONION_E_FORMAT;
    return status == 0 && (end->sequence != source->map_frames || end->crc != source->map_crc) ? ONION_E_CHECKSUM
                                                                                               : status;
}

int onion_volume_load_sealed_map(const struct onion_volume *volume, const struct onion_layer_source *source,
                                 struct onion_layer *layer) {
    struct onion_log_cursor cursor = {.offset = ONION_HEADER_BYTES};
    struct onion_map_bytes map = {0};
    uint64_t fault = 0;
    int status = onion_volume_read_sealed_map(volume, source, &map, &fault);
    if (status == 0)
        status = onion_layer_grow(layer, onion_log_blocks(map.bytes, map.length, layer->block_shift));
    if (status == 0)
        status = onion_layer_load(layer, map.bytes, map.length, &cursor, &fault);
    status = onion_volume_check_sealed_end(source, &cursor, status);
    onion_map_bytes_free(&map);
    return onion_site_set(status, source->map_path, fault);
}
