/* whole_io.h: calls on a file that a signal does not end. A call that is interrupted is made again; one that moves only a
 * part of its bytes is continued.
 *
 * A handler without SA_RESTART interrupts calls (Python's handlers are such). Which calls, the file system decides: FUSE
 * and NFS let nearly all be interrupted. */
#ifndef ONIONSKIN_BASE_WHOLE_IO_H
#define ONIONSKIN_BASE_WHOLE_IO_H

#include <stdint.h>

#include "base/status.h"

/* 0, or -errno: -ENOSPC, -EIO... After an error, a part of the bytes may have been written. */
int onion_pwrite_all(int fd, const void *bytes, uint64_t length, uint64_t offset);
/* 0, or -errno, or ONION_E_FORMAT if the file ends before the range does. */
int onion_pread_all(int fd, void *bytes, uint64_t length, uint64_t offset);
/* open(2): a descriptor, or -errno. `mode` counts with O_CREAT. */
int onion_open(const char *path, int flags, unsigned mode);
/* ftruncate(2): 0 or -errno. */
int onion_truncate(int fd, uint64_t length);
/* fallocate(2) without a flag: gives a range blocks, and the file the size that it needs. 0 or -errno; after an error, a
 * part of the range may have blocks. A range that signals do not let finish is asked for in smaller pieces. */
int onion_allocate(int fd, uint64_t offset, uint64_t length);

#endif
