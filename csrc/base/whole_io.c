/* whole_io.c: implements whole_io.h. */
#define _GNU_SOURCE
#include "base/whole_io.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define CALL_BYTES_MAX (1u << 30) /* Linux moves less than 2 GiB in one call */
#define ALLOCATED_BYTES_MIN (64u << 10)

int onion_pwrite_all(int fd, const void *bytes, uint64_t length, uint64_t offset) {
    const char *from = bytes;
    while (length) {
        ssize_t n = pwrite(fd, from, length < CALL_BYTES_MAX ? length : CALL_BYTES_MAX, (off_t)offset);
        if (n == 0 || (n < 0 && errno != EINTR))
            return n < 0 ? -errno : -EIO;
        if (n > 0)
            from += n, offset += (uint64_t)n, length -= (uint64_t)n;
    }
    return 0;
}

int onion_pread_all(int fd, void *bytes, uint64_t length, uint64_t offset) {
    char *to = bytes;
    while (length) {
        ssize_t n = pread(fd, to, length < CALL_BYTES_MAX ? length : CALL_BYTES_MAX, (off_t)offset);
        if (n == 0 || (n < 0 && errno != EINTR))
            return n < 0 ? -errno : ONION_E_FORMAT;
        if (n > 0)
            to += n, offset += (uint64_t)n, length -= (uint64_t)n;
    }
    return 0;
}

int onion_open(const char *path, int flags, unsigned mode) {
    int fd;
    while ((fd = open(path, flags, (mode_t)mode)) < 0)
        if (errno != EINTR)
            return -errno;
    return fd;
}

int onion_truncate(int fd, uint64_t length) {
    while (ftruncate(fd, (off_t)length))
        if (errno != EINTR)
            return -errno;
    return 0;
}

int onion_allocate(int fd, uint64_t offset, uint64_t length) {
    uint64_t piece = length;
    while (length) {
        uint64_t turn = piece < length ? piece : length;
        if (fallocate(fd, 0, (off_t)offset, (off_t)turn) == 0)
            offset += turn, length -= turn;
        else if (errno != EINTR)
            return -errno;
        else if (piece > ALLOCATED_BYTES_MIN) /* tmpfs gives back what it has done, and begins anew */
            piece /= 2;
    }
    return 0;
}
