/* barrier.c: see barrier.h. */
#define _GNU_SOURCE
#include "base/barrier.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "base/whole_io.h"

int onion_sync_file(int fd) {
    while (fdatasync(fd))
        if (errno != EINTR)
            return -errno;
    return 0;
}

void onion_start_writing(int fd) { (void)sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE); }

int onion_sync_directory(const char *path) {
    int fd = onion_open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    int status = 0;
    while (status == 0 && fsync(fd))
        status = errno == EINTR ? 0 : -errno;
    close(fd);
    return status;
}
