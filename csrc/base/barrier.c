/* barrier.c: see barrier.h. */
#define _GNU_SOURCE
#include "base/barrier.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

int onion_sync_file(int fd) {
    while (fdatasync(fd))
        if (errno != EINTR)
            return -errno;
    return 0;
}

void onion_start_writing(int fd) { (void)sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE); }

int onion_sync_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int status = fsync(fd) ? -errno : 0;
    close(fd);
    return status;
}
