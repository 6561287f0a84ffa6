/* whole_io.h: writes or reads all bytes of a range of a file. A call that is interrupted, or that moves only a part of
 * them, is continued. */
#ifndef ONIONSKIN_BASE_WHOLE_IO_H
#define ONIONSKIN_BASE_WHOLE_IO_H

#include <stdint.h>

#include "base/status.h"

/* 0, or -errno: -ENOSPC, -EIO... After an error, a part of the bytes may have been written. */
int onion_pwrite_all(int fd, const void *bytes, uint64_t length, uint64_t offset);
/* 0, or -errno, or ONION_E_FORMAT if the file ends before the range does. */
int onion_pread_all(int fd, void *bytes, uint64_t length, uint64_t offset);

#endif
