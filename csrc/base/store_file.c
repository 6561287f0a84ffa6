/* store_file.c: see store_file.h. */
#define _GNU_SOURCE
#include "base/store_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/linux_io.h"
#include "base/whole_io.h"

/* Holes in a log are what a crash leaves in its last frame, whose pages were not all written. Up to this length nothing
 * is asked; a longer file that has more holes than data was made by no flush. */
#define SPARSE_BYTES_MAX (64ull << 20)

int onion_open_file(const char *path, int flags) {
    /* O_NONBLOCK: a pipe with nobody at the other end would be waited for. Regular files know nothing of it. */
    int fd = onion_open(path, flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0);
    struct stat info;
    if (fd < 0)
        return fd == -ELOOP || fd == -ENXIO || fd == -EISDIR ? ONION_E_NOT_A_FILE : fd;
    int status = fstat(fd, &info) ? -errno : S_ISREG(info.st_mode) ? 0 : ONION_E_NOT_A_FILE;
    if (status == 0)
        return fd;
    close(fd);
    return status;
}

/* Looks at the directory of a file; -errno. */
static int look_at_directory(const char *path, struct stat *found) {
    char directory[PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t length = slash == NULL ? 1 : slash == path ? 1 : (size_t)(slash - path);
    if (length >= sizeof directory)
        return -ENAMETOOLONG;
    memcpy(directory, slash == NULL ? "." : path, length);
    directory[length] = '\0';
    return stat(directory, found) ? -errno : 0;
}

/* Lets those use a file who may use its directory. src/onionskin/base/modes.py does the same. */
static int share(int fd, const struct stat *directory) {
    int shared = (directory->st_mode & (S_ISGID | S_IRWXG)) == (S_ISGID | S_IRWXG);
    if (shared && fchmod(fd, 0660)) /* the umask does not count */
        return -errno;
    if (geteuid() == 0 && directory->st_uid && fchown(fd, directory->st_uid, directory->st_gid)) {
        /* The root of a sandbox may not, or does not know that user. */
    }
    return 0;
}

int onion_make_file(const char *path) {
    struct stat directory;
    int status = look_at_directory(path, &directory);
    if (status)
        return status;
    int fd = onion_open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return fd;
    status = share(fd, &directory);
    if (status == 0)
        return fd;
    close(fd);
    unlink(path);
    return status;
}

int onion_store_note(struct onion_store *store, const char *segments_directory) {
    struct stat info;
    if (asprintf(&store->catalog, "%s/../catalog.db", segments_directory) < 0) {
        store->catalog = NULL;
        return -ENOMEM;
    }
    if (stat(store->catalog, &info)) {
        int status = errno == ENOENT || errno == ENOTDIR ? 0 : -errno;
        onion_store_forget(store);
        return status;
    }
    store->device = info.st_dev;
    store->inode = info.st_ino;
    return 0;
}

void onion_store_forget(struct onion_store *store) {
    free(store->catalog);
    store->catalog = NULL;
}

int onion_store_check(const struct onion_store *store) {
    struct stat info;
    if (!store->catalog)
        return 0;
    if (stat(store->catalog, &info))
        return errno == ENOENT || errno == ENOTDIR ? ONION_E_MOVED : -errno;
    return info.st_dev == store->device && info.st_ino == store->inode ? 0 : ONION_E_MOVED;
}

/* The store is looked at once the file is open: what is moved later takes the file along. */
int onion_store_open_file(const struct onion_store *store, const char *path, int flags) {
    int fd = onion_open_file(path, flags);
    int status = fd < 0 && fd != -ENOENT ? 0 : onion_store_check(store);
    if (status == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return status;
}

int onion_store_make_file(const struct onion_store *store, const char *path) {
    int fd = onion_make_file(path);
    int status = fd < 0 && fd != -ENOENT ? 0 : onion_store_check(store);
    if (status == 0)
        return fd;
    if (fd >= 0) {
        unlink(path);
        close(fd);
    }
    return status;
}

static int allocate(struct onion_map_bytes *out, uint64_t length) {
    *out = (struct onion_map_bytes){NULL, 0};
    void *bytes = mmap(NULL, length + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bytes == MAP_FAILED)
        return -ENOMEM;
    *out = (struct onion_map_bytes){bytes, length};
    return 0;
}

/* Where the data ends, and how much of it there is. */
static int measure(int fd, uint64_t length, uint64_t *data_end, uint64_t *data_bytes) {
    struct onion_data_span span;
    int found;
    *data_end = *data_bytes = 0;
    while ((found = onion_seek_data(fd, *data_end, length, &span)) == 1) {
        *data_end = span.offset + span.length;
        *data_bytes += span.length;
    }
    return found;
}

static int read_data(int fd, struct onion_map_bytes *out, uint64_t *fault) {
    struct onion_data_span span;
    uint64_t at = 0;
    int status;
    while ((status = onion_seek_data(fd, at, out->length, &span)) == 1) {
        *fault = span.offset;
        status = onion_pread_all(fd, out->bytes + span.offset, span.length, span.offset);
        if (status < 0)
            break;
        at = span.offset + span.length;
    }
    if (status < 0)
        onion_map_bytes_free(out);
    return status;
}

int onion_map_bytes_read_sealed(int fd, uint64_t length, struct onion_map_bytes *out, uint64_t *fault) {
    struct stat info;
    struct onion_data_span span;
    *out = (struct onion_map_bytes){NULL, 0};
    if (fstat(fd, &info))
        return -errno;
    *fault = (uint64_t)info.st_size < length ? (uint64_t)info.st_size : 0;
    if ((uint64_t)info.st_size < length)
        return ONION_E_FORMAT;
    /* Its frames leave no page all zero. */
    int found = length ? onion_seek_data(fd, 0, length, &span) : 0;
    if (found < 0)
        return found;
    *fault = found && span.offset == 0 ? span.length : 0;
    if (length && *fault != length)
        return ONION_E_FORMAT;
    int status = allocate(out, length);
    return status < 0 ? status : read_data(fd, out, fault);
}

int onion_map_bytes_read(int fd, struct onion_map_bytes *out, uint64_t *fault) {
    struct stat info;
    uint64_t data_end, data_bytes;
    *out = (struct onion_map_bytes){NULL, 0};
    *fault = 0;
    if (fstat(fd, &info))
        return -errno;
    int status = measure(fd, (uint64_t)info.st_size, &data_end, &data_bytes);
    if (status < 0)
        return status;
    if (data_end > SPARSE_BYTES_MAX && data_end / 2 > data_bytes)
        return ONION_E_FORMAT;
    status = allocate(out, data_end);
    return status < 0 ? status : read_data(fd, out, fault);
}

void onion_map_bytes_free(struct onion_map_bytes *read) {
    if (read->bytes)
        munmap(read->bytes, read->length + 1);
    *read = (struct onion_map_bytes){NULL, 0};
}
