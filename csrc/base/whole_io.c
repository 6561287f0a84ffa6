/* whole_io.c: implements whole_io.h. */
#include "base/whole_io.h"

#include <errno.h>
#include <unistd.h>

#define CALL_BYTES_MAX (1u << 30) /* Linux moves less than 2 GiB in one call */

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
