/* recorder.c: writes down every change that a program makes to the files below one directory, in order.
 *
 * Preloaded (LD_PRELOAD) into the program under test. ONIONSKIN_CRASH_ROOT names the directory,
 * ONIONSKIN_CRASH_LOG the file that the log goes to, which must not be below it. replay.py reads the log.
 *
 * What must hold:
 *  - Behaviour never changes: each call is passed on to the kernel as it came, and returns what the kernel returned.
 *    A call that fails is not recorded.
 *  - The order of the log is the order in which the calls took effect: a call that changes something is made and
 *    recorded under one lock, across threads and across processes.
 *  - A sync is two records, made outside the lock: where it began, and that it returned. Only what was recorded
 *    before it began is made durable by it.
 *  - A write to the file .crash-mark in the directory is a marker: its text is recorded, the file itself is not.
 *
 * Hooks use system calls directly, so nothing has to be looked up in libc and nothing records itself. What escapes:
 * stdio, calls that libc makes inside itself (mkstemp), raw system calls, and stores through shared mappings. A
 * writable shared mapping is recorded as such, so that the reader of the log can refuse it.
 *
 * A record, little-endian, no padding: struct record, then path_bytes of the path and path2_bytes of the second
 * path (both relative to the directory), then data_bytes of data. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define RECORD_MAGIC 0x3152434fu /* "OCR1" */
#define MARK_NAME ".crash-mark"
#define COPY_BYTES_MAX ((size_t)1 << 30)

enum record_kind {
    CREATE = 1,   /* path, file; flags: 1 a directory, 2 without a name (O_TMPFILE) */
    TRUNCATE = 2, /* file, length */
    WRITE = 3,    /* file, offset, data */
    ALLOCATE = 4, /* file, offset, length; flags: the mode of fallocate */
    RENAME = 5,   /* path, path2; flags of renameat2 */
    UNLINK = 6,   /* path (a file or an empty directory) */
    LINK = 7,     /* file, path2 */
    SYNC_BEGIN = 8, /* file, sync; flags: 1 fdatasync, 2 a directory, 4 everything (sync, syncfs) */
    SYNC_END = 9,
    MARK = 10,  /* data: the text */
    MAP = 11,   /* file: mapped shared and writable */
    MSYNC = 12, /* known to have happened; no file */
    REFUSED = 13 /* path: a call that replay has no model for */
};

struct record {
    uint32_t magic;
    uint32_t kind;
    uint64_t inode;
    uint64_t device;
    int64_t offset;
    int64_t length;
    int64_t mtime_ns; /* of the file after the call */
    uint64_t sync;    /* joins SYNC_BEGIN and SYNC_END */
    uint64_t data_bytes;
    uint32_t flags;
    uint32_t path_bytes;
    uint32_t path2_bytes;
    uint32_t process;
} __attribute__((packed));

static char root[PATH_MAX];
static size_t root_bytes; /* 0: the recorder is not active */
static char log_path[PATH_MAX];
static int log_fd = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint64_t sync_count;

/* The lock between processes is a lock on the log's open file, so a forked child must open it again. */
static void open_log(void) {
    long fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) {
        fprintf(stderr, "recorder: cannot open the log %s: %s\n", log_path, strerror(errno));
        abort();
    }
    /* Out of the way of programs that count on low numbers. */
    log_fd = fcntl((int)fd, F_DUPFD_CLOEXEC, 900);
    if (log_fd >= 0)
        syscall(SYS_close, fd);
    else
        log_fd = (int)fd;
}

static void lock(void) {
    pthread_mutex_lock(&mutex);
    while (syscall(SYS_flock, log_fd, LOCK_EX) < 0 && errno == EINTR)
        ;
}

static void unlock(void) {
    syscall(SYS_flock, log_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
}

static void before_fork(void) { pthread_mutex_lock(&mutex); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&mutex); }
static void after_fork_in_child(void) {
    pthread_mutex_unlock(&mutex);
    if (root_bytes) {
        syscall(SYS_close, log_fd);
        open_log();
    }
}

__attribute__((constructor)) static void begin(void) {
    const char *directory = getenv("ONIONSKIN_CRASH_ROOT"), *log = getenv("ONIONSKIN_CRASH_LOG");
    if (!directory || !log || !realpath(directory, root))
        return;
    if (strlen(log) >= sizeof log_path)
        return;
    strcpy(log_path, log);
    open_log();
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    root_bytes = strlen(root);
}

/* The part of an absolute path below the root ("" for the root itself), or NULL outside it. */
static const char *below_root(const char *path) {
    if (!root_bytes || strncmp(path, root, root_bytes) != 0)
        return NULL;
    if (path[root_bytes] == '/')
        return path + root_bytes + 1;
    return path[root_bytes] == 0 ? path + root_bytes : NULL;
}

static int is_mark(const char *relative) { return strcmp(relative, MARK_NAME) == 0; }

/* The absolute path of an open descriptor, as the kernel has it. */
static int path_of_descriptor(int fd, char out[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0)
        return -1;
    out[length] = 0;
    return 0;
}

/* The absolute path of a name whose directory exists, with the directory's symbolic links resolved. */
static int path_of_name(int directory, const char *path, char out[PATH_MAX]) {
    char parent[PATH_MAX];
    if (!path || !*path || strlen(path) >= sizeof parent)
        return -1;
    strcpy(parent, path);
    size_t length = strlen(parent);
    while (length > 1 && parent[length - 1] == '/')
        parent[--length] = 0;
    char *slash = strrchr(parent, '/');
    const char *name = slash ? slash + 1 : parent;
    char name_copy[PATH_MAX];
    strcpy(name_copy, name);
    if (!slash)
        strcpy(parent, ".");
    else if (slash == parent)
        parent[1] = 0;
    else
        *slash = 0;
    long fd = syscall(SYS_openat, directory, parent, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int found = path_of_descriptor((int)fd, out);
    syscall(SYS_close, fd);
    if (found < 0 || strlen(out) + 1 + strlen(name_copy) >= PATH_MAX)
        return -1;
    if (strcmp(out, "/") != 0)
        strcat(out, "/");
    strcat(out, name_copy);
    return 0;
}

/* Whether an open descriptor is a regular file or a directory below the root; its path and its state. */
static const char *recorded_descriptor(int fd, char path[PATH_MAX], struct stat *state) {
    int saved = errno;
    const char *relative = NULL;
    if (root_bytes && fd != log_fd && fstat(fd, state) == 0 && (S_ISREG(state->st_mode) || S_ISDIR(state->st_mode)) &&
        path_of_descriptor(fd, path) == 0)
        relative = below_root(path);
    errno = saved;
    return relative;
}

static void write_log(struct iovec *parts, int count) {
    while (count > 0) {
        ssize_t written = syscall(SYS_writev, log_fd, parts, count);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0) {
            fprintf(stderr, "recorder: cannot write the log: %s\n", strerror(errno));
            abort();
        }
        while (count > 0 && (size_t)written >= parts->iov_len) {
            written -= (ssize_t)parts->iov_len;
            parts++, count--;
        }
        if (count > 0) {
            parts->iov_base = (char *)parts->iov_base + written;
            parts->iov_len -= (size_t)written;
        }
    }
}

/* Appends one record. The lock is held. `state` may be NULL. */
static void append(struct record record, const struct stat *state, const char *path, const char *path2,
                   const void *data) {
    int saved = errno;
    record.magic = RECORD_MAGIC;
    record.process = (uint32_t)getpid();
    if (state) {
        record.inode = state->st_ino;
        record.device = state->st_dev;
        record.mtime_ns = (int64_t)state->st_mtim.tv_sec * 1000000000 + state->st_mtim.tv_nsec;
    }
    record.path_bytes = path ? (uint32_t)strlen(path) : 0;
    record.path2_bytes = path2 ? (uint32_t)strlen(path2) : 0;
    struct iovec parts[] = {{&record, sizeof record},
                            {(void *)path, record.path_bytes},
                            {(void *)path2, record.path2_bytes},
                            {(void *)data, record.data_bytes}};
    write_log(parts, 4);
    errno = saved;
}

static void append_refused(const char *what) {
    append((struct record){.kind = REFUSED}, NULL, what, NULL, NULL);
}

/* What a call has just put into a file is read back and recorded as a write. The lock is held. */
static void append_read_back(int fd, off_t offset, size_t length) {
    char path[PATH_MAX], again[64];
    struct stat state;
    const char *relative = recorded_descriptor(fd, path, &state);
    if (!relative || length == 0)
        return;
    int saved = errno;
    snprintf(again, sizeof again, "/proc/self/fd/%d", fd); /* fd may be write-only */
    long reader = syscall(SYS_openat, AT_FDCWD, again, O_RDONLY | O_CLOEXEC, 0);
    char *bytes = length <= COPY_BYTES_MAX ? malloc(length) : NULL;
    size_t done = 0;
    while (bytes && reader >= 0 && done < length) {
        ssize_t got = pread((int)reader, bytes + done, length - done, offset + (off_t)done);
        if (got <= 0)
            break;
        done += (size_t)got;
    }
    if (done == length)
        append((struct record){.kind = WRITE, .offset = offset, .data_bytes = length}, &state, relative, NULL, bytes);
    else
        append_refused("a copy that could not be read back");
    free(bytes);
    if (reader >= 0)
        syscall(SYS_close, reader);
    errno = saved;
}

/* ---- names ---- */

static int open_recorded(int directory, const char *path, int flags, mode_t mode) {
    int changes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE;
    if (!root_bytes || !changes)
        return (int)syscall(SYS_openat, directory, path, flags, mode);
    lock();
    struct stat before;
    int saved = errno;
    int existed = fstatat(directory, path, &before, 0) == 0;
    errno = saved;
    int fd = (int)syscall(SYS_openat, directory, path, flags, mode);
    char absolute[PATH_MAX];
    struct stat state;
    const char *relative = fd < 0 ? NULL : recorded_descriptor(fd, absolute, &state);
    if (relative && !is_mark(relative)) {
        if ((flags & O_TMPFILE) == O_TMPFILE)
            append((struct record){.kind = CREATE, .flags = 2}, &state, NULL, NULL, NULL);
        else if (!existed)
            append((struct record){.kind = CREATE}, &state, relative, NULL, NULL);
        else if ((flags & O_TRUNC) && before.st_size > 0)
            append((struct record){.kind = TRUNCATE}, &state, relative, NULL, NULL);
    }
    unlock();
    return fd;
}

static mode_t mode_argument(int flags, va_list arguments) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? (mode_t)va_arg(arguments, int) : 0;
}

#define OPEN(name)                                              \
    EXPORT int name(const char *path, int flags, ...) {         \
        va_list arguments;                                      \
        va_start(arguments, flags);                             \
        mode_t mode = mode_argument(flags, arguments);          \
        va_end(arguments);                                      \
        return open_recorded(AT_FDCWD, path, flags, mode);      \
    }
#define OPENAT(name)                                                   \
    EXPORT int name(int directory, const char *path, int flags, ...) { \
        va_list arguments;                                             \
        va_start(arguments, flags);                                    \
        mode_t mode = mode_argument(flags, arguments);                 \
        va_end(arguments);                                             \
        return open_recorded(directory, path, flags, mode);            \
    }
#define CREAT(name)                                                                      \
    EXPORT int name(const char *path, mode_t mode) {                                     \
        return open_recorded(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);        \
    }

OPEN(open)
OPEN(open64)
OPEN(__open_2)
OPEN(__open64_2)
OPENAT(openat)
OPENAT(openat64)
OPENAT(__openat_2)
OPENAT(__openat64_2)
CREAT(creat)
CREAT(creat64)

/* Both paths are looked up before the call: afterwards one of them is gone. */
static int rename_recorded(int from, const char *path, int to, const char *path2, unsigned flags) {
    if (!root_bytes)
        return (int)syscall(SYS_renameat2, from, path, to, path2, flags);
    lock();
    char source[PATH_MAX], target[PATH_MAX];
    int saved = errno;
    const char *relative = path_of_name(from, path, source) == 0 ? below_root(source) : NULL;
    const char *relative2 = path_of_name(to, path2, target) == 0 ? below_root(target) : NULL;
    errno = saved;
    int result = (int)syscall(SYS_renameat2, from, path, to, path2, flags);
    if (result == 0 && relative && relative2)
        append((struct record){.kind = RENAME, .flags = flags}, NULL, relative, relative2, NULL);
    else if (result == 0 && (relative || relative2))
        append_refused("a rename into or out of the recorded directory");
    unlock();
    return result;
}

EXPORT int rename(const char *path, const char *path2) {
    return rename_recorded(AT_FDCWD, path, AT_FDCWD, path2, 0);
}
EXPORT int renameat(int from, const char *path, int to, const char *path2) {
    return rename_recorded(from, path, to, path2, 0);
}
EXPORT int renameat2(int from, const char *path, int to, const char *path2, unsigned flags) {
    return rename_recorded(from, path, to, path2, flags);
}

static int unlink_recorded(int directory, const char *path, int flags) {
    if (!root_bytes)
        return (int)syscall(SYS_unlinkat, directory, path, flags);
    lock();
    char absolute[PATH_MAX];
    int saved = errno;
    const char *relative = path_of_name(directory, path, absolute) == 0 ? below_root(absolute) : NULL;
    errno = saved;
    int result = (int)syscall(SYS_unlinkat, directory, path, flags);
    if (result == 0 && relative && !is_mark(relative))
        append((struct record){.kind = UNLINK}, NULL, relative, NULL, NULL);
    unlock();
    return result;
}

EXPORT int unlink(const char *path) { return unlink_recorded(AT_FDCWD, path, 0); }
EXPORT int unlinkat(int directory, const char *path, int flags) { return unlink_recorded(directory, path, flags); }
EXPORT int rmdir(const char *path) { return unlink_recorded(AT_FDCWD, path, AT_REMOVEDIR); }
EXPORT int remove(const char *path) {
    int result = unlink_recorded(AT_FDCWD, path, 0);
    return result < 0 && errno == EISDIR ? unlink_recorded(AT_FDCWD, path, AT_REMOVEDIR) : result;
}

EXPORT int mkdirat(int directory, const char *path, mode_t mode) {
    if (!root_bytes)
        return (int)syscall(SYS_mkdirat, directory, path, mode);
    lock();
    int result = (int)syscall(SYS_mkdirat, directory, path, mode);
    char absolute[PATH_MAX];
    struct stat state;
    if (result == 0 && path_of_name(directory, path, absolute) == 0 && below_root(absolute) &&
        fstatat(directory, path, &state, 0) == 0)
        append((struct record){.kind = CREATE, .flags = 1}, &state, below_root(absolute), NULL, NULL);
    unlock();
    return result;
}
EXPORT int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

EXPORT int linkat(int from, const char *path, int to, const char *path2, int flags) {
    if (!root_bytes)
        return (int)syscall(SYS_linkat, from, path, to, path2, flags);
    lock();
    int result = (int)syscall(SYS_linkat, from, path, to, path2, flags);
    char absolute[PATH_MAX];
    struct stat state;
    if (result == 0 && path_of_name(to, path2, absolute) == 0 && below_root(absolute) &&
        fstatat(to, path2, &state, AT_SYMLINK_NOFOLLOW) == 0)
        append((struct record){.kind = LINK}, &state, NULL, below_root(absolute), NULL);
    unlock();
    return result;
}
EXPORT int link(const char *path, const char *path2) { return linkat(AT_FDCWD, path, AT_FDCWD, path2, 0); }

EXPORT int symlinkat(const char *target, int directory, const char *path) {
    if (!root_bytes)
        return (int)syscall(SYS_symlinkat, target, directory, path);
    lock();
    int result = (int)syscall(SYS_symlinkat, target, directory, path);
    char absolute[PATH_MAX];
    if (result == 0 && path_of_name(directory, path, absolute) == 0 && below_root(absolute))
        append_refused("a symbolic link");
    unlock();
    return result;
}
EXPORT int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

/* ---- bytes ---- */

/* Records what one successful write of `written` bytes did. offset < 0: the file's position has moved past it. */
static void append_written(int fd, const void *data, ssize_t written, off_t offset) {
    char path[PATH_MAX];
    struct stat state;
    const char *relative = written > 0 ? recorded_descriptor(fd, path, &state) : NULL;
    if (!relative)
        return;
    if (is_mark(relative)) {
        append((struct record){.kind = MARK, .data_bytes = (uint64_t)written}, NULL, NULL, NULL, data);
        return;
    }
    /* Linux appends whatever offset pwrite is given where the file was opened with O_APPEND. */
    if (fcntl(fd, F_GETFL) & O_APPEND)
        offset = state.st_size - written;
    else if (offset < 0)
        offset = lseek(fd, 0, SEEK_CUR) - written;
    append((struct record){.kind = WRITE, .offset = offset, .data_bytes = (uint64_t)written}, &state, relative, NULL,
           data);
}

/* Pipes, sockets, terminals and files elsewhere must not wait for the lock: writing to them may block. */
static int is_recorded(int fd) {
    char path[PATH_MAX];
    struct stat state;
    return recorded_descriptor(fd, path, &state) != NULL;
}

EXPORT ssize_t write(int fd, const void *data, size_t length) {
    if (!is_recorded(fd))
        return syscall(SYS_write, fd, data, length);
    lock();
    ssize_t written = syscall(SYS_write, fd, data, length);
    append_written(fd, data, written, -1);
    unlock();
    return written;
}

EXPORT ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    if (!is_recorded(fd))
        return syscall(SYS_pwrite64, fd, data, length, offset);
    lock();
    ssize_t written = syscall(SYS_pwrite64, fd, data, length, offset);
    append_written(fd, data, written, offset);
    unlock();
    return written;
}
EXPORT ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    return pwrite64(fd, data, length, offset);
}

static ssize_t writev_recorded(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    long low = (long)offset, high = 0; /* 64-bit: the whole offset is in the first; -1: the file's position */
    if (!is_recorded(fd))
        return syscall(SYS_pwritev2, fd, parts, count, low, high, flags);
    lock();
    ssize_t written = syscall(SYS_pwritev2, fd, parts, count, low, high, flags);
    char *data = written > 0 ? malloc((size_t)written) : NULL;
    size_t copied = 0;
    for (int i = 0; data && i < count && copied < (size_t)written; i++) {
        size_t part = parts[i].iov_len < (size_t)written - copied ? parts[i].iov_len : (size_t)written - copied;
        memcpy(data + copied, parts[i].iov_base, part);
        copied += part;
    }
    if (data)
        append_written(fd, data, written, offset);
    free(data);
    unlock();
    return written;
}

EXPORT ssize_t writev(int fd, const struct iovec *parts, int count) {
    return writev_recorded(fd, parts, count, -1, 0);
}
EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return writev_recorded(fd, parts, count, offset, 0);
}
EXPORT ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return writev_recorded(fd, parts, count, offset, 0);
}
EXPORT ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return writev_recorded(fd, parts, count, offset, flags);
}
EXPORT ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    return writev_recorded(fd, parts, count, offset, flags);
}

static void append_size(int fd, off_t length) {
    char path[PATH_MAX];
    struct stat state;
    const char *relative = recorded_descriptor(fd, path, &state);
    if (relative && !is_mark(relative))
        append((struct record){.kind = TRUNCATE, .length = length}, &state, relative, NULL, NULL);
}

EXPORT int ftruncate64(int fd, off64_t length) {
    if (!is_recorded(fd))
        return (int)syscall(SYS_ftruncate, fd, length);
    lock();
    int result = (int)syscall(SYS_ftruncate, fd, length);
    if (result == 0)
        append_size(fd, length);
    unlock();
    return result;
}
EXPORT int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

EXPORT int truncate64(const char *path, off64_t length) {
    if (!root_bytes)
        return (int)syscall(SYS_truncate, path, length);
    lock();
    int result = (int)syscall(SYS_truncate, path, length);
    long fd = result == 0 ? syscall(SYS_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC, 0) : -1;
    if (fd >= 0) {
        append_size((int)fd, length);
        syscall(SYS_close, fd);
    }
    unlock();
    return result;
}
EXPORT int truncate(const char *path, off_t length) { return truncate64(path, length); }

EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t length) {
    if (!is_recorded(fd))
        return (int)syscall(SYS_fallocate, fd, mode, offset, length);
    lock();
    int result = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    char path[PATH_MAX];
    struct stat state;
    const char *relative = result == 0 ? recorded_descriptor(fd, path, &state) : NULL;
    if (relative && !is_mark(relative))
        append((struct record){.kind = ALLOCATE, .flags = (uint32_t)mode, .offset = offset, .length = length}, &state,
               relative, NULL, NULL);
    unlock();
    return result;
}
EXPORT int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

/* libc's own falls back to writing where the file system cannot; the fallback is not recorded, so it is left out. */
EXPORT int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    int saved = errno;
    int result = fallocate64(fd, 0, offset, length) < 0 ? errno : 0;
    errno = saved;
    return result;
}
EXPORT int posix_fallocate(int fd, off_t offset, off_t length) { return posix_fallocate64(fd, offset, length); }

EXPORT ssize_t copy_file_range(int source, off64_t *source_offset, int fd, off64_t *offset, size_t length,
                               unsigned flags) {
    if (!is_recorded(fd))
        return syscall(SYS_copy_file_range, source, source_offset, fd, offset, length, flags);
    lock();
    off_t start = offset ? *offset : lseek(fd, 0, SEEK_CUR);
    ssize_t copied = syscall(SYS_copy_file_range, source, source_offset, fd, offset, length, flags);
    if (copied > 0)
        append_read_back(fd, start, (size_t)copied);
    unlock();
    return copied;
}

EXPORT ssize_t sendfile64(int fd, int source, off64_t *source_offset, size_t length) {
    if (!is_recorded(fd))
        return syscall(SYS_sendfile, fd, source, source_offset, length);
    lock();
    off_t start = lseek(fd, 0, SEEK_CUR);
    ssize_t copied = syscall(SYS_sendfile, fd, source, source_offset, length);
    if (copied > 0)
        append_read_back(fd, start, (size_t)copied);
    unlock();
    return copied;
}
EXPORT ssize_t sendfile(int fd, int source, off_t *source_offset, size_t length) {
    return sendfile64(fd, source, source_offset, length);
}

static void append_cloned(int fd, unsigned long request, const void *argument) {
    struct stat state;
    if (request == FICLONE && fstat(fd, &state) == 0) {
        append_size(fd, state.st_size);
        append_read_back(fd, 0, (size_t)state.st_size);
    } else if (request == FICLONERANGE && fstat(fd, &state) == 0) {
        const struct file_clone_range *range = argument;
        uint64_t length = range->src_length ? range->src_length : (uint64_t)state.st_size - range->dest_offset;
        append_read_back(fd, (off_t)range->dest_offset, (size_t)length);
    }
}

EXPORT int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if ((request != FICLONE && request != FICLONERANGE) || !is_recorded(fd))
        return (int)syscall(SYS_ioctl, fd, request, argument);
    lock();
    int result = (int)syscall(SYS_ioctl, fd, request, argument);
    if (result == 0)
        append_cloned(fd, request, argument);
    unlock();
    return result;
}

static void *mmap_recorded(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    void *result = (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    if (result != MAP_FAILED && fd >= 0 && !(flags & MAP_ANONYMOUS) && (protection & PROT_WRITE) &&
        (flags & MAP_TYPE) != MAP_PRIVATE) {
        char path[PATH_MAX];
        struct stat state;
        const char *relative = recorded_descriptor(fd, path, &state);
        if (relative) {
            lock();
            append((struct record){.kind = MAP}, &state, relative, NULL, NULL);
            unlock();
        }
    }
    return result;
}
EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    return mmap_recorded(address, length, protection, flags, fd, offset);
}
EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset) {
    return mmap_recorded(address, length, protection, flags, fd, offset);
}

/* ---- barriers ---- */

static uint64_t append_sync_begin(const struct stat *state, const char *relative, uint32_t flags) {
    lock();
    uint64_t sync = (uint64_t)getpid() << 32 | ++sync_count;
    append((struct record){.kind = SYNC_BEGIN, .sync = sync, .flags = flags}, state, relative, NULL, NULL);
    unlock();
    return sync;
}

static void append_sync_end(const struct stat *state, const char *relative, uint32_t flags, uint64_t sync) {
    lock();
    append((struct record){.kind = SYNC_END, .sync = sync, .flags = flags}, state, relative, NULL, NULL);
    unlock();
}

static int sync_recorded(long number, int fd, uint32_t flags) {
    char path[PATH_MAX];
    struct stat state;
    const char *relative = recorded_descriptor(fd, path, &state);
    if (!relative || is_mark(relative))
        return (int)syscall(number, fd);
    if (S_ISDIR(state.st_mode))
        flags |= 2;
    uint64_t sync = append_sync_begin(&state, relative, flags);
    int result = (int)syscall(number, fd);
    if (result == 0)
        append_sync_end(&state, relative, flags, sync);
    return result;
}

EXPORT int fsync(int fd) { return sync_recorded(SYS_fsync, fd, 0); }
EXPORT int fdatasync(int fd) { return sync_recorded(SYS_fdatasync, fd, 1); }
EXPORT int syncfs(int fd) { return sync_recorded(SYS_syncfs, fd, 4); }

EXPORT void sync(void) {
    uint64_t begun = root_bytes ? append_sync_begin(NULL, NULL, 4) : 0;
    syscall(SYS_sync);
    if (root_bytes)
        append_sync_end(NULL, NULL, 4, begun);
}

EXPORT int msync(void *address, size_t length, int flags) {
    int result = (int)syscall(SYS_msync, address, length, flags);
    if (result == 0 && root_bytes) {
        lock();
        append((struct record){.kind = MSYNC}, NULL, NULL, NULL, NULL);
        unlock();
    }
    return result;
}
