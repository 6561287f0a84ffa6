/* journal.c: implements journal.h. */
#define _GNU_SOURCE
#include "volume/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/btrfs.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "base/sigbus.h"
#include "base/store_file.h"
#include "volume/internal.h"

#define FIRST_BYTES 16384u /* the first size of a half, which then doubles */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14, and headers that are older */
#endif
#define HALF_BYTES_MAX (ONION_JOURNAL_RECORDS_MAX * sizeof(struct onion_record))

_Static_assert(sizeof(struct onion_record) == 24, "records lie in the file as they are");
_Static_assert(HALF_BYTES_MAX % 4096 == 0, "the second half begins on a page");
_Static_assert(sizeof(struct onion_journal_header) <= ONION_JOURNAL_HEADER_BYTES, "the header has one page");

static off_t half_offset(int half) { return (off_t)(ONION_JOURNAL_HEADER_BYTES + (uint64_t)half * HALF_BYTES_MAX); }

/* ---- which boot, which mount ---- */

enum filesystem_kind {
    FILESYSTEM_UNIQUE_MOUNT = 1,
    FILESYSTEM_MOUNT = 2,
    FILESYSTEM_SYSFS = 3, /* inode of the file system's directory in sysfs: each mounting has a number of its own */
    FILESYSTEM_MEMORY = 4,
};

#define TMPFS 0x01021994

/* 0, or -errno; -ENOSYS: /proc is not there, or hidden. */
static int read_boot_id(unsigned char *out) {
    char text[64] = {0};
    int fd = onion_open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC, 0);
    if (fd == -ENOENT || fd == -ENOTDIR || fd == -EACCES)
        return -ENOSYS;
    if (fd < 0)
        return fd;
    ssize_t length = read(fd, text, sizeof text - 1);
    int digits = 0, status = length < 0 ? -errno : 0;
    close(fd);
    for (ssize_t i = 0; i < length && digits < 32; i++) {
        char *end, digit[2] = {text[i], 0};
        unsigned value = (unsigned)strtoul(digit, &end, 16);
        if (end == digit)
            continue;
        out[digits / 2] = (unsigned char)(digits % 2 ? out[digits / 2] | value : value << 4);
        digits++;
    }
    return status < 0 ? status : digits == 32 ? 0 : -ENOSYS;
}

/* The name under /sys/fs of the type of a file system that has a directory there for each that is mounted, or NULL. */
static const char *sysfs_type(const struct statfs *fs) {
    return fs->f_type == 0xEF53             ? "ext4"
           : fs->f_type == 0x58465342       ? "xfs"
           : fs->f_type == (long)0xF2F52010 ? "f2fs"
           : fs->f_type == (long)0x9123683E ? "btrfs"
                                            : NULL;
}

/* The name of a file system's own directory under /sys/fs/TYPE: that of its device, or of a btrfs, which may have
 * several, its UUID. Returns -errno. */
static int sysfs_name(int fd, dev_t device, const char *type, char *name, size_t size) {
    if (!strcmp(type, "btrfs")) {
        struct btrfs_ioctl_fs_info_args about = {0};
        if (ioctl(fd, BTRFS_IOC_FS_INFO, &about))
            return -errno;
        int at = 0;
        for (int i = 0; i < 16; i++)
            at += snprintf(name + at, size - (size_t)at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x",
                           about.fsid[i]);
        return 0;
    }
    char link[64], target[4096];
    snprintf(link, sizeof link, "/sys/dev/block/%u:%u", major(device), minor(device));
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return -errno;
    target[length] = 0;
    const char *slash = strrchr(target, '/'), *last = slash ? slash + 1 : target;
    size_t bytes = strlen(last) + 1;
    if (bytes > size)
        return -ENAMETOOLONG;
    memcpy(name, last, bytes);
    return 0;
}

/* A service that is restarted may see its disk through another mount of the same file system, because systemd gives
 * each start its own tree of mounts. So the number that is used, if there is one, belongs to the mounted file system
 * and not to the mount: the inode of its directory in sysfs. Sets 0 if there is none. 0, or -errno. */
static int sysfs_inode(int fd, dev_t device, const struct statfs *fs, uint64_t *inode) {
    const char *type = sysfs_type(fs);
    char name[256], node[300];
    struct stat info;
    *inode = 0;
    if (!type)
        return 0;
    int status = sysfs_name(fd, device, type, name, sizeof name);
    if (status == 0) {
        snprintf(node, sizeof node, "/sys/fs/%s/%s", type, name);
        status = stat(node, &info) ? -errno : 0;
    }
    if (status == 0)
        *inode = info.st_ino;
    /* Others say that there is no /sys, that it is hidden, or that this file system has nothing there. */
    return status == -ENOMEM || status == -EIO ? status : 0;
}

static uint64_t mount_id(int fd, uint32_t *kind) {
    unsigned char answer[256] = {0}; /* a struct statx, which not every C library declares */
    uint32_t mask;
    uint64_t id;
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x5000u /* MNT_ID, MNT_ID_UNIQUE */, answer))
        return 0;
    memcpy(&mask, answer, sizeof mask);
    memcpy(&id, answer + 0x90, sizeof id);
    *kind = mask & 0x4000 ? FILESYSTEM_UNIQUE_MOUNT : FILESYSTEM_MOUNT;
    return mask & 0x5000 ? id : 0;
}

/* Fills in the fields of a header that identify this boot and this mount. -ENOSYS: they cannot be told. */
static int describe_here(int fd, struct onion_journal_header *header) {
    struct stat info;
    struct statfs fs;
    int status = fstat(fd, &info) || fstatfs(fd, &fs) ? -errno : read_boot_id(header->boot_id);
    if (status < 0)
        return status;
    header->device = info.st_dev;
    header->filesystem_kind = FILESYSTEM_MEMORY;
    header->filesystem = 0;
    if (fs.f_type == TMPFS) /* its files end with the mount */
        return 0;
    header->filesystem_kind = FILESYSTEM_SYSFS;
    status = sysfs_inode(fd, info.st_dev, &fs, &header->filesystem);
    if (status == 0 && !header->filesystem)
        header->filesystem = mount_id(fd, &header->filesystem_kind);
    return status < 0 ? status : header->filesystem ? 0 : -ENOSYS;
}

static int is_same_place(const struct onion_journal_header *found, const struct onion_journal_header *here) {
    return !memcmp(found->boot_id, here->boot_id, sizeof here->boot_id) && found->device == here->device &&
           found->filesystem == here->filesystem && found->filesystem_kind == here->filesystem_kind;
}

/* Returns whether `fs` says itself which of its mountings it is, so that a file of another one can be told from this. */
static int is_known(const struct statfs *fs) { return fs->f_type == TMPFS || sysfs_type(fs) != NULL; }

/* Returns whether a file was written in this boot and mount, or -errno. ONION_E_WHICH_BOOT: this process cannot tell,
 * because /proc or /sys is not there. Its writer may have seen more of the system than it does, or less, so the number
 * of the kind that is in the file is compared. ONION_E_OTHER_MOUNT: it is of this boot, and was written through a mount
 * that cannot be compared with this one (of an overlayfs, NFS, FUSE, or of what lies below one): what was written may
 * well be here, and nobody can prove it. */
static int is_of_here(int fd, const struct onion_journal_header *found) {
    unsigned char boot_id[sizeof found->boot_id];
    uint64_t here = 0;
    uint32_t kind = 0;
    struct stat info;
    struct statfs fs;
    if (fstat(fd, &info) || fstatfs(fd, &fs))
        return -errno;
    int status = read_boot_id(boot_id);
    if (status < 0)
        return status == -ENOSYS ? ONION_E_WHICH_BOOT : status;
    if (memcmp(found->boot_id, boot_id, sizeof boot_id))
        return 0;
    int is_same_device = found->device == info.st_dev;
    switch (found->filesystem_kind) {
    case FILESYSTEM_MEMORY:
        return !is_known(&fs) ? ONION_E_OTHER_MOUNT : is_same_device && fs.f_type == TMPFS;
    case FILESYSTEM_SYSFS:
        if (!is_known(&fs))
            return ONION_E_OTHER_MOUNT;
        if (!is_same_device)
            return 0;
        status = sysfs_inode(fd, info.st_dev, &fs, &here);
        return status < 0 ? status : here ? here == found->filesystem : ONION_E_WHICH_BOOT;
    case FILESYSTEM_UNIQUE_MOUNT:
    case FILESYSTEM_MOUNT:
        here = mount_id(fd, &kind);
        return is_same_device && kind == found->filesystem_kind && here == found->filesystem ? 1 : ONION_E_OTHER_MOUNT;
    default:
        return 0;
    }
}

static uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- guarded access ---- */

struct copy {
    void *to;
    const void *from;
    size_t length;
};

static int copy_from(void *context) {
    struct copy *copy = context;
    onion_fault_watch(copy->from, copy->length);
    memcpy(copy->to, copy->from, copy->length);
    onion_fault_unwatch();
    return 0;
}

static int copy_to(void *context) {
    struct copy *copy = context;
    onion_fault_watch(copy->to, copy->length);
    memcpy(copy->to, copy->from, copy->length);
    onion_fault_unwatch();
    return 0;
}

int onion_journal_copy(struct onion_record *to, const struct onion_record *from, size_t count) {
    struct copy copy = {to, from, count * sizeof *from};
    return onion_fault_run(copy_from, &copy);
}

/* Stores bytes in the mapped file. Stores stay in the order of the calls, so a process that dies in between has made
 * the earlier ones. */
static int store_bytes(void *to, const void *from, size_t length) {
    struct copy copy = {to, from, length};
    int status = onion_fault_run(copy_to, &copy);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return status;
}

static int store_count(struct onion_journal *journal, int half, uint64_t count) {
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return store_bytes(&journal->header->halves[half].record_count, &count, sizeof count);
}

/* ---- the file ---- */

void onion_journal_init(struct onion_journal *journal) {
    memset(journal, 0, sizeof *journal);
    journal->fd = journal->found_fd = -1;
}

int onion_journal_set_path(struct onion_volume *volume, const char *path) {
    volume->journal.opened_ns = monotonic_ns();
    if (path && !(volume->journal.path = strdup(path)))
        return -ENOMEM;
    return 0;
}

/* Allocates blocks for a range of the file. If the file system cannot, or a sandbox forbids it, zeros are written instead. */
static int allocate(int fd, off_t offset, size_t length) {
    int status = onion_allocate(fd, (uint64_t)offset, length);
    if (status != -EOPNOTSUPP && status != -ENOSYS && status != -EPERM)
        return status;
    char *zeros = calloc(1, length);
    status = zeros ? onion_pwrite_all(fd, zeros, length, (uint64_t)offset) : -ENOMEM;
    free(zeros);
    return status;
}

/* Has the pages there before a record goes to them: the first record of a half comes right behind a cut, from a writer.
 * Without MADV_RANDOM the first fault of a mapping fills the page cache around it with the zeros of the hole between the
 * halves, for as much as the disk reads ahead: 1 to 3 ms where that is 8 MiB, and a kernel need not let anybody else run
 * meanwhile. Both are hints: a page that is not there comes with the first record. */
static void make_ready(void *mapped, size_t length) {
    (void)madvise(mapped, length, MADV_RANDOM); /* stays when the mapping grows */
    (void)madvise(mapped, length, MADV_POPULATE_WRITE);
}

static int map_shared(int fd, off_t offset, size_t length, void **out) {
    *out = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    if (*out == MAP_FAILED) {
        *out = NULL;
        return -errno;
    }
    madvise(*out, length, MADV_DONTFORK); /* a child process must never write here */
    make_ready(*out, length);
    return 0;
}

/* Makes a half twice as large. Its address may change, because it is only used under dirty_lock. */
static int grow_half(struct onion_journal *journal, int half) {
    size_t before = journal->capacity[half] * sizeof(struct onion_record), after = before ? 2 * before : FIRST_BYTES;
    after = after > HALF_BYTES_MAX ? HALF_BYTES_MAX : after;
    before = (before + 4095) / 4096 * 4096;
    if (after <= before)
        return ONION_E_JOURNAL_FULL;
    int status = allocate(journal->fd, half_offset(half) + (off_t)before, after - before);
    if (status < 0)
        return status;
    void *mapped = NULL;
    if (!before)
        status = map_shared(journal->fd, half_offset(half), after, &mapped);
    else if ((mapped = mremap(journal->records[half], before, after, MREMAP_MAYMOVE)) == MAP_FAILED)
        status = -errno;
    if (status < 0)
        return status;
    journal->records[half] = mapped;
    journal->capacity[half] = after / sizeof(struct onion_record);
    return 0;
}

static void unmap_all(struct onion_journal *journal) {
    for (int half = 0; half < 2; half++) {
        if (journal->records[half])
            munmap(journal->records[half],
                   (journal->capacity[half] * sizeof(struct onion_record) + 4095) / 4096 * 4096);
        journal->records[half] = NULL;
        journal->capacity[half] = 0;
    }
    if (journal->header)
        munmap(journal->header, ONION_JOURNAL_HEADER_BYTES);
    journal->header = NULL;
    if (journal->fd >= 0)
        close(journal->fd);
    journal->fd = -1;
}

static void close_found(struct onion_journal *journal) {
    if (journal->found_fd >= 0)
        close(journal->found_fd);
    journal->found_fd = -1;
}

/* Sets the number of records up to which writers go on. A half that a flush has taken must have room for all records
 * that are added meanwhile. */
static void set_limit(struct onion_volume *volume) {
    const struct onion_journal *journal = &volume->journal;
    size_t limit = journal->capacity[journal->current];
    if (journal->taken_count) {
        size_t left = journal->capacity[!journal->current] - journal->taken_count;
        limit = left < limit ? left : limit;
    }
    volume->dirty_records.record_capacity = limit;
}

static void use_half(struct onion_volume *volume, int half) {
    struct onion_journal *journal = &volume->journal;
    journal->current = half;
    volume->dirty_records.records = journal->records[half];
    volume->dirty_records.published = &journal->header->halves[half].record_count;
}

/* Returns whether a later opening of the same volume made the file at the path, or -errno. If so, this data path is about
 * to be closed, and records in it are dropped. */
static int is_replaced(const struct onion_journal *journal, const struct onion_journal_header *here) {
    struct onion_journal_header found;
    int fd = onion_open_file(journal->path, O_RDONLY);
    if (fd < 0)
        return fd == -ENOENT || fd == ONION_E_NOT_A_FILE ? 0 : fd;
    int status = onion_pread_all(fd, &found, sizeof found, 0);
    close(fd);
    if (status < 0)
        return status == ONION_E_FORMAT ? 0 : status;
    return is_same_place(&found, here) && !memcmp(found.magic, ONION_JOURNAL_MAGIC, sizeof found.magic) &&
           found.opened_ns > journal->opened_ns;
}

/* On btrfs a write to a mapped page needs a new block, and raises SIGBUS if the disk is full. A file with this flag is
 * overwritten in place and keeps its blocks. The flag has to be set before the file has blocks. */
static void overwrite_in_place(int fd) {
    int flags = 0;
    if (ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0 && !(flags & FS_NOCOW_FL)) {
        flags |= FS_NOCOW_FL;
        (void)ioctl(fd, FS_IOC_SETFLAGS, &flags); /* other file systems do not know the flag, and do not need it */
    }
}

/* Makes the file under another name, and gives it blocks and mappings. -EEXIST: another data path of the volume has the
 * name. If the process is killed here, the next process that opens the volume for writing removes the file. */
static int make_file(struct onion_volume *volume, const char *staged) {
    struct onion_journal *journal = &volume->journal;
    struct onion_journal_header header = {.magic = ONION_JOURNAL_MAGIC,
                                          .version = ONION_JOURNAL_VERSION,
                                          .block_size = volume->block_size,
                                          .opened_ns = journal->opened_ns};
    void *mapped = NULL;
    journal->fd = onion_make_file(staged);
    if (journal->fd < 0)
        return journal->fd;
    overwrite_in_place(journal->fd);
    int status = describe_here(journal->fd, &header);
    if (status == 0)
        status = is_replaced(journal, &header);
    if (status > 0)
        status = -ENOSYS;
    if (status == 0)
        status = allocate(journal->fd, 0, ONION_JOURNAL_HEADER_BYTES);
    if (status == 0)
        status = map_shared(journal->fd, 0, ONION_JOURNAL_HEADER_BYTES, &mapped);
    journal->header = mapped;
    for (int half = 0; half < 2 && status == 0; half++)
        status = grow_half(journal, half);
    header.halves[0].order = journal->order = 1;
    header.halves[0].owner = journal->owner;
    header.halves[0].alternative = journal->alternative;
    return status < 0 ? status : store_bytes(journal->header, &header, sizeof header);
}

/* Moves the dirty records from the heap to the file. A process that died left them, and they are not durable yet. */
static int move_dirty_records(struct onion_volume *volume) {
    struct onion_dirty_records *dirty = &volume->dirty_records;
    struct onion_record *records = dirty->records;
    size_t count = dirty->record_count;
    int status = 0;
    use_half(volume, 0);
    dirty->record_count = 0;
    dirty->declared = 0;
    set_limit(volume);
    for (size_t i = 0; i < count && status == 0; i++) {
        while (status == 0 && dirty->record_count + 2 > dirty->record_capacity) {
            status = grow_half(&volume->journal, 0);
            use_half(volume, 0);
            set_limit(volume);
        }
        if (status == 0)
            status = onion_dirty_records_put(volume, &records[i]);
    }
    if (status < 0) {
        dirty->records = records;
        dirty->record_count = dirty->record_capacity = count;
        dirty->published = NULL;
        return status;
    }
    free(records);
    return 0;
}

static int begin(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    if (journal->heap_taken)
        return ONION_E_JOURNAL_FULL;
    char *staged = NULL;
    int status = -EEXIST;
    for (int number = 0; status == -EEXIST && number < ONION_JOURNAL_STAGED_NAMES; number++) {
        free(staged);
        if (asprintf(&staged, "%s.%d", journal->path, number) < 0)
            return -ENOMEM;
        status = make_file(volume, staged);
    }
    if (status == -EEXIST) { /* a volume never has so many data paths; the records stay in the heap */
        free(staged);
        return -ENOSYS;
    }
    if (status == 0)
        status = move_dirty_records(volume);
    if (status == 0 && rename(staged, journal->path)) {
        status = -errno;
        onion_volume_mark_poisoned(volume); /* the dirty records are in a file that gets no name; this was never seen */
    }
    if (status < 0) {
        unlink(staged);
        if (!volume->dirty_records.published)
            unmap_all(journal);
    } else {
        close_found(journal);
    }
    free(staged);
    return status;
}

/* Returns whether the file system cannot have such a file. Then the records stay in the heap, and if the process dies,
 * changes that were not flushed are lost. */
static int is_impossible(int status) {
    return status == -ENODEV || status == -EOPNOTSUPP || status == -ENOSYS || status == -EINVAL;
}

static int grow(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    size_t needed = volume->dirty_records.record_count + 2;
    int status = 0;
    while (status == 0 && needed > journal->capacity[journal->current])
        status = grow_half(journal, journal->current);
    while (status == 0 && journal->taken_count && needed > journal->capacity[!journal->current] - journal->taken_count)
        status = grow_half(journal, !journal->current);
    use_half(volume, journal->current);
    set_limit(volume);
    return status == -ENOSPC || status == -EDQUOT || status == -EFBIG ? ONION_E_JOURNAL_FULL : status;
}

int onion_journal_make_room(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    int status = journal->header ? grow(volume) : begin(volume);
    if (is_impossible(status)) {
        free(journal->path);
        journal->path = NULL;
        return 0;
    }
    return status < 0 ? onion_dirty_records_note_fault(volume, status) : 0;
}

/* ---- a flush ---- */

static void store_owners(struct onion_volume *volume, int half) {
    struct onion_journal *journal = &volume->journal;
    struct onion_journal_half *stored = &journal->header->halves[half];
    /* They are stored one after the other: while one of them is half stored, the other one is valid. */
    if (store_bytes(&stored->owner, &journal->owner, sizeof stored->owner) < 0 ||
        store_bytes(&stored->alternative, &journal->alternative, sizeof stored->alternative) < 0)
        onion_volume_mark_poisoned(volume);
}

static void switch_halves(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    struct onion_dirty_records *dirty = &volume->dirty_records;
    uint64_t order = ++journal->order;
    int other = !journal->current;
    store_owners(volume, other);
    if (store_bytes(&journal->header->halves[other].order, &order, sizeof order) < 0)
        onion_volume_mark_poisoned(volume);
    journal->taken_count = dirty->record_count;
    *dirty = (struct onion_dirty_records){0};
    use_half(volume, other);
    set_limit(volume);
}

void onion_journal_take(struct onion_volume *volume, struct onion_dirty_records *batch,
                        const struct onion_journal_owner *owner, const struct onion_journal_owner *alternative) {
    static const struct onion_journal_owner none;
    struct onion_journal *journal = &volume->journal;
    journal->owner = *owner;
    journal->alternative = alternative ? *alternative : none;
    if (!batch->record_count) { /* nothing was taken, so the present half goes on */
        batch->records = NULL;
        batch->published = NULL;
        if (journal->header)
            store_owners(volume, journal->current);
    } else if (journal->header) {
        switch_halves(volume);
    } else {
        journal->heap_taken = journal->path != NULL;
        volume->dirty_records = (struct onion_dirty_records){0};
    }
}

/* Changes the state that records go on from to a later frame of the same map. While it is advancing, no frames mean any
 * frame, so the stored state is right whenever the process dies. */
static int advance(struct onion_journal_owner *owner, const struct onion_journal_owner *now) {
    static const uint32_t yes = 1, no;
    static const uint64_t any;
    int status = store_bytes(&owner->is_advancing, &yes, sizeof yes);
    if (status == 0)
        status = store_bytes(&owner->frames, &any, sizeof any);
    if (status == 0)
        status = store_bytes(&owner->crc, &now->crc, sizeof now->crc);
    if (status == 0)
        status = store_bytes(&owner->frames, &now->frames, sizeof now->frames);
    return status < 0 ? status : store_bytes(&owner->is_advancing, &no, sizeof no);
}

static void advance_owners(struct onion_volume *volume, const struct onion_journal_owner *now) {
    struct onion_journal *journal = &volume->journal;
    int is_owner = !memcmp(journal->owner.map_id, now->map_id, ONION_UUID_BYTES);
    struct onion_journal_owner *mine = is_owner ? &journal->owner : &journal->alternative;
    if (memcmp(mine->map_id, now->map_id, ONION_UUID_BYTES))
        return;
    mine->frames = now->frames;
    mine->crc = now->crc;
    if (!journal->header)
        return;
    struct onion_journal_half *half = &journal->header->halves[journal->current];
    if (advance(is_owner ? &half->owner : &half->alternative, now) < 0)
        onion_volume_mark_poisoned(volume);
}

void onion_journal_drop_taken(struct onion_volume *volume, const struct onion_journal_owner *now) {
    struct onion_journal *journal = &volume->journal;
    advance_owners(volume, now);
    if (journal->found_fd >= 0) { /* its records are in the frame now */
        (void)onion_truncate(journal->found_fd, 0);
        close_found(journal);
    }
    journal->heap_taken = 0;
    if (!journal->header)
        return;
    if (store_count(journal, !journal->current, 0) < 0)
        onion_volume_mark_poisoned(volume); /* the records that are left may name slots that will be used again */
    journal->taken_count = 0;
    set_limit(volume);
}

int onion_journal_put_back(struct onion_volume *volume, struct onion_dirty_records *batch) {
    struct onion_journal *journal = &volume->journal;
    struct onion_dirty_records *later = &volume->dirty_records;
    int newer = journal->current, older = !newer;
    struct onion_record *copied = malloc((later->record_count + 1) * sizeof *copied);
    int status = copied ? onion_journal_copy(copied, later->records, later->record_count) : -ENOMEM;
    if (status == 0)
        status =
            store_bytes(journal->records[older] + batch->record_count, copied, later->record_count * sizeof *copied);
    free(copied);
    uint64_t count = batch->record_count + later->record_count;
    /* First the older half gets all records. Those of the newer half are in the file twice then, which changes
     * nothing. */
    if (status == 0 && !batch->is_held)
        status = store_count(journal, older, count);
    if (status == 0)
        status = store_count(journal, newer, 0);
    journal->taken_count = 0;
    use_half(volume, older);
    set_limit(volume);
    later->declared = later->record_count ? later->declared : batch->declared;
    later->is_held = batch->is_held;
    later->join_from = 0;
    later->record_count = count;
    return status;
}

/* ---- the state that records go on from ---- */

void onion_journal_begin_at(struct onion_volume *volume, const struct onion_journal_owner *owner) {
    volume->journal.owner = *owner;
}

void onion_journal_add_owner(struct onion_volume *volume, const struct onion_journal_owner *alternative) {
    struct onion_journal *journal = &volume->journal;
    journal->alternative = *alternative;
    if (journal->header)
        store_owners(volume, journal->current);
}

void onion_journal_resolve_owner(struct onion_volume *volume, const unsigned char *map_id) {
    static const struct onion_journal_owner none;
    struct onion_journal *journal = &volume->journal;
    if (!memcmp(journal->alternative.map_id, map_id, ONION_UUID_BYTES))
        journal->owner = journal->alternative;
    journal->alternative = none;
    if (journal->header)
        store_owners(volume, journal->current);
}

/* ---- a failed sync ---- */

void onion_journal_mark_poisoned(struct onion_volume *volume) {
    static const uint32_t now = ONION_JOURNAL_POISONED;
    struct onion_journal *journal = &volume->journal;
    pthread_mutex_lock(&volume->dirty_lock);
    if (!journal->header && journal->found_fd >= 0)
        (void)onion_pwrite_all(journal->found_fd, &now, sizeof now, offsetof(struct onion_journal_header, poisoned));
    else if (journal->path && (journal->header || begin(volume) == 0))
        (void)store_bytes(&journal->header->poisoned, &now, sizeof now);
    pthread_mutex_unlock(&volume->dirty_lock);
}

void onion_journal_clear_poisoned(struct onion_volume *volume) {
    static const uint32_t was = ONION_JOURNAL_WAS_POISONED;
    struct onion_journal *journal = &volume->journal;
    journal->found_poisoned = 0;
    if (volume->dirty_records.record_count) {
        (void)onion_pwrite_all(journal->found_fd, &was, sizeof was, offsetof(struct onion_journal_header, poisoned));
    } else {
        (void)onion_truncate(journal->found_fd, 0);
        close_found(journal);
    }
}

/* ---- records that a process left when it died ---- */

struct found {
    struct onion_journal_header header;
    struct onion_record *records[2];
};

/* Reads the header of the file at the path. Returns 1 if it is of this boot and mount, and its counts fit its
 * length, and 0 if there is no such file; -errno if that cannot be told now: what a process left that died must not be
 * taken for nothing because this one has no descriptor to look with. */
static int read_found(struct onion_volume *volume, struct found *found) {
    struct onion_journal *journal = &volume->journal;
    const struct onion_journal_half *halves = found->header.halves;
    struct stat info;
    int fd = onion_open_file(journal->path, volume->writable ? O_RDWR : O_RDONLY);
    if (fd < 0)
        return fd == -ENOENT || fd == -ENOTDIR || fd == ONION_E_NOT_A_FILE ? 0 : fd;
    journal->found_fd = fd;
    int status = fstat(fd, &info) ? -errno : onion_pread_all(fd, &found->header, sizeof found->header, 0);
    if (status < 0)
        return status == ONION_E_FORMAT ? 0 : status;
    if (memcmp(found->header.magic, ONION_JOURNAL_MAGIC, sizeof found->header.magic) ||
        found->header.version != ONION_JOURNAL_VERSION || found->header.block_size != volume->block_size)
        return 0;
    for (int half = 0; half < 2; half++) {
        uint64_t count = halves[half].record_count;
        if (count > ONION_JOURNAL_RECORDS_MAX ||
            (count && (uint64_t)half_offset(half) + count * sizeof(struct onion_record) > (uint64_t)info.st_size))
            return 0;
    }
    if (!halves[0].record_count && !halves[1].record_count && !found->header.poisoned)
        return 0;
    return is_of_here(fd, &found->header);
}

/* The log of the head as it was replayed. */
struct replayed {
    const unsigned char *bytes;
    uint64_t length;
};

/* Returns whether the log passes through the state of an owner, and has at most `frames_behind` frames after it. */
static int is_owner(const struct onion_volume *volume, const struct onion_journal_owner *owner,
                    const struct replayed *log, uint64_t frames_behind) {
    uint64_t frames = volume->log.cursor.sequence;
    if (memcmp(owner->map_id, volume->log.map_id, ONION_UUID_BYTES))
        return 0;
    if (owner->is_advancing && !owner->frames)
        return 1;
    if (frames > owner->frames + frames_behind)
        return 0;
    return owner->frames == 0 || (log->bytes && onion_log_passes(log->bytes, log->length, owner->frames, owner->crc));
}

/* Sets the number of slots that the file of a segment holds in full. 0, or -errno if it cannot be looked at. */
static int count_slots(const struct onion_segment *segment, uint64_t *slots) {
    struct stat info;
    *slots = 0;
    if (lstat(segment->path, &info))
        return errno == ENOENT ? 0 : -errno;
    if (S_ISREG(info.st_mode) && (uint64_t)info.st_size >= ONION_HEADER_BYTES)
        *slots = ((uint64_t)info.st_size - ONION_HEADER_BYTES) >> segment->block_shift;
    return 0;
}

/* Records name segments by the numbers of the opening that wrote them. This table gives the numbers of this opening. */
struct translation {
    struct onion_volume *volume;
    uint32_t segment_first;
    uint16_t number_of[ONION_SEGMENT_LAST + 1];
    uint64_t slots[ONION_SEGMENT_LAST + 1];
};

static int name_segment(struct translation *translation, const struct onion_record *record) {
    unsigned char uuid[ONION_UUID_BYTES];
    onion_record_uuid(record, uuid);
    uint32_t number = onion_volume_find_segment(translation->volume, uuid);
    if (number < translation->segment_first || !translation->volume->segments[number]->own)
        return ONION_E_FORMAT;
    translation->number_of[record->segment] = (uint16_t)number;
    return count_slots(translation->volume->segments[number], &translation->slots[record->segment]);
}

/* Takes over one of the records that were found, after the same checks as for a record of a log. */
static int take_record(struct translation *translation, const struct onion_record *raw) {
    struct onion_volume *volume = translation->volume;
    struct onion_dirty_records *dirty = &volume->dirty_records;
    struct onion_record record = *raw;
    if (!onion_record_is_sound(&record, ONION_VOLUME_BYTES_MAX >> volume->block_shift))
        return ONION_E_FORMAT;
    switch (record.kind) {
    case ONION_RECORD_SEGMENT:
        return name_segment(translation, &record);
    case ONION_RECORD_DATA:
        if (!translation->number_of[record.segment] ||
            (uint64_t)record.slot + record.block_count > translation->slots[record.segment])
            return ONION_E_FORMAT;
        record.segment = translation->number_of[record.segment];
        break;
    case ONION_RECORD_HOLE:
    case ONION_RECORD_ZERO: /* both mean that the block reads zero; the right kind depends on what is below now */
        record.kind = volume->nothing_below ? ONION_RECORD_HOLE : ONION_RECORD_ZERO;
        break;
    default:
        return ONION_E_FORMAT;
    }
    dirty->records[dirty->record_count++] = record;
    return 0;
}

static int take_half(struct onion_volume *volume, const struct found *found, int half, uint32_t segment_first) {
    uint64_t count = found->header.halves[half].record_count;
    struct onion_record *records = malloc((count + 1) * sizeof *records);
    struct translation *translation = calloc(1, sizeof *translation);
    int status = records && translation ? onion_pread_all(volume->journal.found_fd, records, count * sizeof *records,
                                                          (uint64_t)half_offset(half))
                                        : -ENOMEM;
    if (translation) {
        translation->volume = volume;
        translation->segment_first = segment_first;
    }
    for (uint64_t i = 0; i < count && status == 0; i++)
        status = take_record(translation, &records[i]);
    free(records);
    free(translation);
    return status;
}

static int has_owner(const struct onion_volume *volume, const struct onion_journal_half *half,
                     const struct replayed *log, uint64_t frames_behind) {
    return half->record_count && (is_owner(volume, &half->owner, log, frames_behind) ||
                                  is_owner(volume, &half->alternative, log, frames_behind));
}

/* Returns whether a half has records that go on from the log.
 *
 * Of a half that is a frame behind, all is in that frame, except where the process died between the frame and the advance
 * of its owner: then the half that was taken is there too. And a failed flush puts all records into one half, behind a
 * frame that may be there. Any other file was put back by hand, and older than the log: what it says of blocks that were
 * written since must not count, nor name slots that were used again. */
static int goes_on(const struct onion_volume *volume, const struct onion_journal_header *header, int half,
                   const struct replayed *log) {
    const struct onion_journal_half *halves = header->halves;
    if (has_owner(volume, &halves[half], log, 0))
        return 1;
    return has_owner(volume, &halves[half], log, 1) && (header->poisoned || has_owner(volume, &halves[!half], log, 1));
}

/* Takes over the records of the halves that go on from the log. Returns 0 also if no half does; -ENOMEM, -EIO, or
 * ONION_E_FORMAT if a half does and is not sound. */
static int take_halves(struct onion_volume *volume, const struct found *found, const struct replayed *log,
                       uint32_t segment_first) {
    const struct onion_journal_half *halves = found->header.halves;
    int first = halves[0].order <= halves[1].order ? 0 : 1, status = 0;
    volume->dirty_records.records =
        malloc((halves[0].record_count + halves[1].record_count + 1) * sizeof *volume->dirty_records.records);
    if (!volume->dirty_records.records)
        return -ENOMEM;
    for (int i = 0; i < 2 && status == 0; i++) {
        int half = first ^ i;
        if (goes_on(volume, &found->header, half, log))
            status = take_half(volume, found, half, segment_first);
    }
    return status;
}

int onion_journal_find(struct onion_volume *volume, const unsigned char *log, uint64_t length, uint32_t segment_first) {
    struct onion_journal *journal = &volume->journal;
    struct onion_dirty_records *dirty = &volume->dirty_records;
    struct found found = {0};
    const struct replayed replayed = {log, length};
    if (!journal->path)
        return 0;
    int status = read_found(volume, &found);
    /* Of which boot and mount it is matters only where something would be taken over from it. */
    int is_poisoned = found.header.poisoned && found.header.poisoned != ONION_JOURNAL_WAS_POISONED;
    if ((status == ONION_E_OTHER_MOUNT || status == ONION_E_WHICH_BOOT) && !is_poisoned &&
        !goes_on(volume, &found.header, 0, &replayed) && !goes_on(volume, &found.header, 1, &replayed))
        status = 0;
    if (status == 1) {
        journal->found_poisoned = is_poisoned;
        status = take_halves(volume, &found, &replayed, segment_first);
    }
    if (status < 0)
        dirty->record_count = 0;
    if (!dirty->record_count) {
        free(dirty->records);
        dirty->records = NULL;
        if (!journal->found_poisoned)
            close_found(journal);
    }
    dirty->record_capacity = dirty->record_count; /* it is full, so the first change makes the file of this opening */
    return status < 0 && status != ONION_E_FORMAT ? onion_site_set(status, journal->path, 0) : 0;
}

void onion_journal_leave_found(struct onion_volume *volume) {
    free(volume->dirty_records.records);
    volume->dirty_records = (struct onion_dirty_records){0};
    close_found(&volume->journal);
}

/* ---- the end ---- */

void onion_journal_drop_stale(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    char magic[sizeof ONION_JOURNAL_MAGIC - 1];
    struct stat info;
    if (!journal->path || journal->header || journal->found_fd >= 0)
        return;
    int fd = onion_open(journal->path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0);
    if (fd < 0)
        return;
    if (!fstat(fd, &info) && S_ISREG(info.st_mode) && info.st_nlink == 1 &&
        !onion_pread_all(fd, magic, sizeof magic, 0) && !memcmp(magic, ONION_JOURNAL_MAGIC, sizeof magic))
        (void)onion_truncate(fd, 0);
    close(fd);
}

void onion_journal_close(struct onion_volume *volume) {
    struct onion_journal *journal = &volume->journal;
    int is_durable = !volume->dirty_records.record_count && !journal->taken_count &&
                     !__atomic_load_n(&volume->poisoned, __ATOMIC_SEQ_CST);
    if (journal->header && (is_durable || volume->superseded))
        (void)onion_truncate(journal->fd, 0);
    if (journal->found_fd >= 0 && volume->superseded)
        (void)onion_truncate(journal->found_fd, 0);
    if (journal->header) { /* otherwise the records are in the heap */
        volume->dirty_records.records = NULL;
        volume->dirty_records.published = NULL;
        volume->dirty_records.record_count = volume->dirty_records.record_capacity = 0;
    }
    unmap_all(journal);
    close_found(journal);
    free(journal->path);
    journal->path = NULL;
}
