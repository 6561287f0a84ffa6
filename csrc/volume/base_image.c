/* base_image.c: maps the raw image that a volume stands on. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "volume/internal.h"

/* Opens the file again, for a descriptor with its own file position and locks. Without /proc, it shares them with
 * `fd`. */
static int open_again(int fd) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = onion_open(path, O_RDONLY | O_CLOEXEC, 0);
    if (again < 0)
        again = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return again < 0 ? -errno : again;
}

static int size_of_base(int fd, uint64_t *size_bytes) {
    struct stat info;
    if (fstat(fd, &info))
        return -errno;
    off_t end = S_ISBLK(info.st_mode) ? lseek(fd, 0, SEEK_END) : info.st_size;
    *size_bytes = (uint64_t)end;
    return S_ISREG(info.st_mode) || S_ISBLK(info.st_mode) ? (end < 0 ? -errno : 0) : ONION_E_NOT_A_FILE;
}

static int map_base(struct onion_mapping *mapping, uint64_t size_bytes, int allow_short) {
    uint64_t present = 0; /* set for compilers that do not see that size_of_base sets it */
    int status = size_of_base(mapping->fd, &present);
    if (status == 0 && present < size_bytes && !allow_short)
        status = ONION_E_FORMAT;
    uint64_t length = present < size_bytes ? present : size_bytes;
    if (status < 0 || !length)
        return status;
    void *address = mmap(NULL, length, PROT_READ, MAP_SHARED, mapping->fd, 0);
    if (address == MAP_FAILED)
        return -errno;
    mapping->address = address;
    mapping->length = length;
    return 0;
}

int onion_base_map(int fd, uint64_t size_bytes, int allow_short, struct onion_mapping **out) {
    struct onion_mapping *mapping = calloc(1, sizeof *mapping);
    if (!mapping)
        return -ENOMEM;
    mapping->fd = open_again(fd);
    int status = mapping->fd < 0 ? mapping->fd : map_base(mapping, size_bytes, allow_short);
    if (status < 0) {
        if (mapping->fd >= 0)
            close(mapping->fd);
        free(mapping);
        return status;
    }
    *out = mapping;
    return 0;
}

void onion_base_release(void *context, void *object) {
    struct onion_mapping *mapping = object;
    (void)context;
    if (mapping->length)
        munmap(mapping->address, mapping->length);
    close(mapping->fd);
    free(mapping);
}

int onion_volume_set_base(struct onion_volume *volume, int fd, uint64_t size_bytes, int allow_short) {
    int status = onion_base_map(fd, size_bytes, allow_short, &volume->base);
    if (status == 0) {
        volume->base_bytes = size_bytes;
        volume->nothing_below = 0;
    }
    return status;
}
