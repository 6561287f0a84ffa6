/* linux_io.c: the Linux calls behind linux_io.h.
 *
 * What must hold: "cannot" is only said for the errno values by which a file system, or an old kernel, refuses a
 * request as such; every other failure is handed on, so that a full or failing disk is never taken for one that
 * merely lacks a feature. */
#define _GNU_SOURCE
#include "base/linux_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Not in linux/magic.h: these live outside of the kernel tree, or keep their number to themselves. */
enum { ZFS_MAGIC = 0x2fc12fc1, BCACHEFS_MAGIC = (int)0xca451a4e };
/* Of a header that older kernels do not have whole. */
#ifndef CIFS_SUPER_MAGIC
#define CIFS_SUPER_MAGIC 0xff534d42
#endif
#ifndef SMB2_SUPER_MAGIC
#define SMB2_SUPER_MAGIC 0xfe534d42
#endif
#ifndef CEPH_SUPER_MAGIC
#define CEPH_SUPER_MAGIC 0x00c36400
#endif
#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546
#endif

static int ask_fiemap(struct onion_data_walk *walk, uint64_t offset, uint32_t flags) {
    union {
        struct fiemap request;
        unsigned char room[sizeof(struct fiemap) + ONION_WALK_EXTENTS * sizeof(struct fiemap_extent)];
    } buffer = {.request = {.fm_start = offset,
                            .fm_length = FIEMAP_MAX_OFFSET - offset,
                            .fm_flags = flags,
                            .fm_extent_count = ONION_WALK_EXTENTS}};
    const struct fiemap *answer = &buffer.request;

    walk->known_from = walk->known_to = 0;
    while (ioctl(walk->fd, FS_IOC_FIEMAP, &buffer.request) < 0)
        if (errno != EINTR)
            return -errno;
    walk->span_count = answer->fm_mapped_extents;
    walk->known_to = UINT64_MAX;
    for (uint32_t i = 0; i < walk->span_count; i++) {
        const struct fiemap_extent *extent = &answer->fm_extents[i];
        walk->spans[i] = (struct onion_data_span){.offset = extent->fe_logical,
                                                  .length = extent->fe_length,
                                                  .shared = (extent->fe_flags & FIEMAP_EXTENT_SHARED) != 0};
        if (i == ONION_WALK_EXTENTS - 1 && !(extent->fe_flags & FIEMAP_EXTENT_LAST))
            walk->known_to = extent->fe_logical + extent->fe_length;
    }
    walk->known_from = offset;
    return walk->known_to > offset ? 0 : -EIO; /* an answer that leads nowhere would be asked for for ever */
}

int onion_data_walk_begin(struct onion_data_walk *walk, int fd) {
    int status;

    memset(walk, 0, sizeof *walk);
    walk->fd = fd;
    status = ask_fiemap(walk, 0, FIEMAP_FLAG_SYNC);
    if (status == -EOPNOTSUPP || status == -ENOTTY || status == -EBADR || status == -EINVAL || status == -ENOSYS)
        return 0;
    walk->has_fiemap = status == 0;
    return status;
}

/* Where the first data at or after `offset` begins, if that is below `before`: 1, 0 or -errno. *start is -1 where the file
 * system knows no holes. */
static int first_data(int fd, uint64_t offset, uint64_t before, off_t *start) {
    *start = -1;
    if (offset >= before)
        return 0;
    *start = lseek(fd, (off_t)offset, SEEK_DATA);
    if (*start < 0)
        return errno == ENXIO ? 0 : (errno == EINVAL || errno == EOPNOTSUPP) ? 1 : -errno;
    return (uint64_t)*start < before;
}

int onion_seek_data(int fd, uint64_t offset, uint64_t end, struct onion_data_span *span) {
    return onion_seek_data_to(fd, offset, end, end, span);
}

int onion_seek_data_to(int fd, uint64_t offset, uint64_t before, uint64_t end, struct onion_data_span *span) {
    off_t start, stop;
    int status = first_data(fd, offset, before, &start);

    *span = (struct onion_data_span){.offset = offset, .length = end - offset};
    if (status <= 0 || start < 0)
        return status;
    stop = lseek(fd, start, SEEK_HOLE);
    if (stop < 0 && errno != ENXIO)
        return -errno;
    /* ENXIO: the file was cut meanwhile. No answer is behind start: take what is left as data. */
    span->offset = (uint64_t)start;
    span->length = (stop > start && (uint64_t)stop < end ? (uint64_t)stop : end) - (uint64_t)start;
    return 1;
}

int onion_has_data(int fd, uint64_t offset, uint64_t end) {
    off_t start;

    return first_data(fd, offset, end, &start);
}

int onion_was_cut(int fd, uint64_t size_bytes) {
    struct stat found;

    if (fstat(fd, &found) < 0)
        return -errno;
    return S_ISREG(found.st_mode) && (uint64_t)found.st_size < size_bytes;
}

int onion_data_walk_next(struct onion_data_walk *walk, uint64_t offset, uint64_t end, struct onion_data_span *span) {
    if (!walk->has_fiemap)
        return onion_seek_data(walk->fd, offset, end, span);
    while (offset < end) {
        if (offset < walk->known_from || offset >= walk->known_to) {
            int status = ask_fiemap(walk, offset, 0);
            if (status < 0)
                return status;
        }
        for (uint32_t i = 0; i < walk->span_count; i++) {
            const struct onion_data_span *known = &walk->spans[i];
            uint64_t stop = known->offset + known->length;

            if (stop <= offset)
                continue;
            if (known->offset >= end)
                return 0;
            span->offset = known->offset > offset ? known->offset : offset;
            span->length = (stop < end ? stop : end) - span->offset;
            span->shared = known->shared;
            return 1;
        }
        offset = walk->known_to;
    }
    return 0;
}

int onion_punch(int fd, uint64_t offset, uint64_t length) {
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) < 0) {
        if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EPERM) /* the last in a sandbox */
            return 0;
        if (errno != EINTR)
            return -errno;
    }
    return 1;
}

void onion_drop_cached(int fd, uint64_t offset, uint64_t length) {
    uint64_t mask = (2ull << 20) - 1, start = offset & ~mask; /* of the largest folio */

    (void)posix_fadvise(fd, (off_t)start, (off_t)(((offset + length + mask) & ~mask) - start), POSIX_FADV_DONTNEED);
}

int onion_reflink(int source, uint64_t source_offset, int destination, uint64_t destination_offset, uint64_t length) {
    struct file_clone_range range = {
        .src_fd = source, .src_offset = source_offset, .src_length = length, .dest_offset = destination_offset};

    while (ioctl(destination, FICLONERANGE, &range) < 0) {
        if (errno == EOPNOTSUPP || errno == EXDEV || errno == EINVAL || errno == ENOTTY || errno == ENOSYS)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
    return 1;
}

/* glibc has it from 2.27 on, and a wheel may meet 2.17: weak, so that there it is absent rather than unresolved. Not
 * syscall(), which the crash harness could not record. */
extern ssize_t copy_file_range(int, loff_t *, int, loff_t *, size_t, unsigned) __attribute__((weak));

int64_t onion_copy_range(int source, uint64_t source_offset, int destination, uint64_t destination_offset,
                         uint64_t length) {
    loff_t from = (loff_t)source_offset, to = (loff_t)destination_offset;
    ssize_t copied;

    if (!copy_file_range)
        return -EOPNOTSUPP;
    while ((copied = copy_file_range(source, &from, destination, &to, length, 0)) < 0) {
        /* EBADF and EPERM: append-only or immutable in a way that write() may still allow; ETXTBSY: a swap file. */
        if (errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP || errno == EBADF ||
            errno == EPERM || errno == ETXTBSY)
            return -EOPNOTSUPP;
        if (errno != EINTR)
            return -errno;
    }
    return copied;
}

void onion_write_out(int fd, uint64_t offset, uint64_t length) {
    (void)sync_file_range(fd, (off_t)offset, (off_t)length, SYNC_FILE_RANGE_WRITE);
}

int onion_is_remote(int fd) {
    struct statfs filesystem;

    if (fstatfs(fd, &filesystem) < 0)
        return 0;
    switch ((uint32_t)filesystem.f_type) {
    case NFS_SUPER_MAGIC:
    case CIFS_SUPER_MAGIC:
    case SMB2_SUPER_MAGIC:
    case CEPH_SUPER_MAGIC:
    case FUSE_SUPER_MAGIC:
        return 1;
    default:
        return 0;
    }
}

int onion_is_copy_on_write(int fd, uint32_t *filesystem_magic) {
    struct statfs filesystem;
    int attributes = 0;

    while (fstatfs(fd, &filesystem) < 0)
        if (errno != EINTR)
            return -errno;
    *filesystem_magic = (uint32_t)filesystem.f_type;
    switch (*filesystem_magic) {
    case BTRFS_SUPER_MAGIC:
    case (uint32_t)BCACHEFS_MAGIC:
        return ioctl(fd, FS_IOC_GETFLAGS, &attributes) < 0 || !(attributes & FS_NOCOW_FL);
    case ZFS_MAGIC:
    case F2FS_SUPER_MAGIC: /* log-structured: as good as copy-on-write here */
    case NILFS_SUPER_MAGIC:
        return 1;
    default:
        return 0;
    }
}
