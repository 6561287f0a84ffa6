/* check_faults.c: a short history of one volume, run again and again with one system call that fails: the nth pwrite
 * (half of it written, then the disk is full), or the nth fdatasync.
 *
 * What must hold: after a pwrite that failed the verb can be called again, and in the end all is as without the fault;
 * after a sync that failed the volume is poisoned, which its file says before anybody is told, and the next opening
 * writes all that the head holds again, since the kernel may take for clean what never reached the disk; and what an
 * opening finds is all that was acknowledged. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "volume/journal.h"
#include "volume/volume.h"

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            fprintf(stderr, "%s:%d: not so: %s (fault %d)\n", __FILE__, __LINE__, #condition, fault_at); \
            abort();                                                                                     \
        }                                                                                                \
    } while (0)

enum { BLOCK = 4096, BLOCKS = 24 };
enum fault { NONE, FULL, SYNC };

static enum fault fault;
static int fault_at, calls, hit;
static char root[200], segments_directory[300], layers_directory[300], map_path[320], next_path[320], dirty_path[320];
/* Each snapshot that fails behind its cut leaves its spare to the head, as the catalog would say. */
static const unsigned char own[4][ONION_UUID_BYTES] = {"own", "spare", "next", "last"},
                           map_id[ONION_UUID_BYTES] = "map", next_id[ONION_UUID_BYTES] = "next";
static struct onion_volume *volume;
static unsigned char now[BLOCKS], flushed[BLOCKS]; /* what each block is filled with */
static struct written {
    ino_t file;
    off_t offset, end;
} written[4096]; /* by pwrite, since it was emptied */
static size_t written_count;

/* ---- the calls that fail: they stand before those of the C library ---- */

static int fails(enum fault kind) { return fault == kind && calls++ == fault_at && (hit = 1); }

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    static int full_next;
    if (fails(FULL) && length > 1) {
        full_next = 1;
        length /= 2;
    } else if (full_next) {
        full_next = 0;
        errno = ENOSPC;
        return -1;
    }
    struct stat info;
    fstat(fd, &info);
    written[written_count++ % 4096] = (struct written){info.st_ino, offset, offset + (off_t)length};
    return syscall(SYS_pwrite64, fd, bytes, length, offset);
}

static int was_written(const char *path, off_t offset, off_t length) {
    struct stat info;
    CHECK(stat(path, &info) == 0 && written_count < 4096);
    for (size_t i = 0; i < written_count; i++)
        if (written[i].file == info.st_ino && written[i].offset <= offset && offset + length <= written[i].end)
            return 1;
    return 0;
}

int fdatasync(int fd) {
    if (fails(SYNC)) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

/* ---- the history ---- */

/* Again where the disk was full, but no more than once. */
#define TRY(call)                                \
    do {                                         \
        int status_ = (call);                    \
        if (status_ == -ENOSPC && fault == FULL) \
            status_ = (call);                    \
        if (status_ < 0 && fault == SYNC && hit) \
            return;                              \
        CHECK(status_ == 0);                     \
    } while (0)

static void fill(uint64_t first, uint64_t count, unsigned char with) { memset(now + first, with, count); }

static int write_filled(uint64_t first, uint64_t count, unsigned char with) {
    static char bytes[BLOCKS * BLOCK];
    memset(bytes, with, count * BLOCK);
    fill(first, count, with);
    return onion_volume_write(volume, first * BLOCK, count * BLOCK, bytes);
}

static int write_halves(uint64_t block, unsigned char with) {
    char half[BLOCK / 2];
    memset(half, with, sizeof half);
    fill(block, 1, with);
    int status = onion_volume_write(volume, block * BLOCK, sizeof half, half);
    return status < 0 ? status : onion_volume_write(volume, block * BLOCK + sizeof half, sizeof half, half);
}

static int write_scattered(unsigned char with) {
    static char bytes[4 * BLOCK];
    const uint64_t indices[4] = {20, 3, 11, 20};
    memset(bytes, with, sizeof bytes);
    for (int i = 0; i < 4; i++)
        fill(indices[i], 1, with);
    return onion_volume_write_blocks(volume, indices, 4, bytes);
}

static int zero(uint64_t first, uint64_t count) {
    fill(first, count, 0);
    return onion_volume_zero(volume, first * BLOCK, count * BLOCK);
}

static int flush(void) {
    int status = onion_volume_flush(volume);
    if (status == 0)
        memcpy(flushed, now, sizeof now);
    return status;
}

/* What is sealed is written behind the cut, into room that the log has. A disk that overwrites nothing in place can be full
 * even there: then the spare is the head's, and the next try needs another one. */
static int seal(void) {
    struct onion_sealed sealed;
    if (!onion_volume_has_spare(volume))
        CHECK(onion_volume_set_spare(volume, own[2]) == 0);
    return onion_volume_seal(volume, next_path, next_id, &sealed);
}

static void history(void) {
    TRY(write_filled(0, 8, 1));
    TRY(write_halves(9, 2));
    TRY(flush());
    TRY(write_filled(2, 4, 3));
    TRY(zero(0, 5));
    TRY(write_scattered(4));
    TRY(flush());
    TRY(write_filled(0, 12, 5));
    TRY(zero(6, 3));
    TRY(seal());
    TRY(write_filled(4, 4, 6));
    TRY(write_halves(10, 7));
    TRY(onion_volume_seal_abort(volume));
    TRY(write_scattered(8));
    TRY(flush());
    TRY(zero(3, 20));
    TRY(write_filled(1, 3, 9));
    TRY(flush());
}

/* Whether the file of a segment is there, whose id begins with these digits and ends with zeros. */
static int has_segment(const char *digits) {
    char path[400];
    int length = snprintf(path, sizeof path, "%s/", segments_directory), end = length + 2 * ONION_UUID_BYTES;
    length += snprintf(path + length, sizeof path - (size_t)length, "%s", digits);
    while (length < end)
        path[length++] = '0';
    snprintf(path + length, sizeof path - (size_t)length, ".seg");
    return access(path, F_OK) == 0;
}

static void open_volume(void) {
    uint32_t own_count = has_segment("6e657874") ? 3 : has_segment("7370617265") ? 2 : 1; /* "next", "spare" */
    struct onion_head_source source = {
        .map_path = map_path, .own = own, .own_count = own_count, .dirty_path = dirty_path};
    memcpy(source.map_id, map_id, sizeof map_id);
    memcpy(source.spare, own[own_count], sizeof own[0]);
    CHECK(onion_volume_new(BLOCK, BLOCKS * BLOCK, segments_directory, layers_directory, 1, 1, &volume) == 0);
    CHECK(onion_volume_open_head(volume, &source) == 0);
    CHECK(onion_volume_free_own_slots(volume) == 0);
}

static void check_contents(int all_flushed) {
    unsigned char bytes[BLOCK];
    for (uint64_t block = 0; block < BLOCKS; block++) {
        CHECK(onion_volume_read(volume, block * BLOCK, BLOCK, bytes) == 0);
        CHECK(all_flushed ? bytes[0] == now[block]
                          : bytes[0] == flushed[block] || bytes[0] >= flushed[block] || !bytes[0]);
        CHECK(memcmp(bytes, bytes + BLOCK / 2, BLOCK / 2) == 0 || !all_flushed);
    }
}

/* What the file of dirty records says of a failed sync. */
static int is_marked(void) {
    struct onion_journal_header header = {0};
    FILE *file = fopen(dirty_path, "rb");
    size_t found = file ? fread(&header, sizeof header, 1, file) : 0;
    if (file)
        fclose(file);
    return found && header.poisoned;
}

static void check_written_again(void) {
    struct onion_segment_info infos[4];
    struct onion_run runs[BLOCKS];
    uint64_t next;
    uint32_t count = onion_volume_segments(volume, infos, 4);
    int64_t found = onion_volume_runs(volume, 0, BLOCKS, runs, BLOCKS, &next);
    for (int64_t i = 0; i < found; i++) {
        if (!onion_location_is_data(runs[i].location))
            continue;
        const char *name = NULL;
        for (uint32_t k = 0; k < count; k++)
            if (infos[k].number == onion_location_segment(runs[i].location))
                name = (const char *)infos[k].uuid;
        char path[400];
        int length = snprintf(path, sizeof path, "%s/", segments_directory);
        for (int byte = 0; byte < ONION_UUID_BYTES; byte++)
            length += snprintf(path + length, sizeof path - (size_t)length, "%02x", (unsigned char)name[byte]);
        snprintf(path + length, sizeof path - (size_t)length, ".seg");
        CHECK(was_written(path, ONION_HEADER_BYTES + (off_t)onion_location_slot(runs[i].location) * BLOCK,
                          (off_t)runs[i].block_count * BLOCK));
    }
    CHECK(access(map_path, F_OK) || was_written(map_path, 0, ONION_HEADER_BYTES));
    CHECK(!is_marked());
}

static void empty(const char *directory) {
    DIR *opened = opendir(directory);
    struct dirent *entry;
    while ((entry = readdir(opened)))
        unlinkat(dirfd(opened), entry->d_name, 0);
    closedir(opened);
}

/* One history with one fault. Returns whether the fault was met. */
static int once(enum fault kind, int at) {
    memset(now, 0, sizeof now);
    memset(flushed, 0, sizeof flushed);
    fault = NONE;
    hit = calls = 0;
    open_volume();
    fault = kind, fault_at = at;
    history();
    if (kind == SYNC && hit)
        CHECK(onion_volume_poisoned(volume) && is_marked() && onion_volume_flush(volume) == ONION_E_POISONED);
    fault = NONE;
    onion_volume_free(volume);
    written_count = 0;
    open_volume();
    if (kind == SYNC && hit)
        check_written_again();
    check_contents(1);
    CHECK(write_filled(7, 1, 77) == 0 && flush() == 0);
    onion_volume_free(volume);
    unlink(dirty_path);
    empty(segments_directory);
    empty(layers_directory);
    return hit;
}

int main(void) {
    const char *directory = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/check_faults.XXXXXX", directory ? directory : "/tmp");
    CHECK(mkdtemp(root));
    snprintf(segments_directory, sizeof segments_directory, "%s/segments", root);
    snprintf(layers_directory, sizeof layers_directory, "%s/layers", root);
    snprintf(dirty_path, sizeof dirty_path, "%s/dirty", root);
    snprintf(map_path, sizeof map_path, "%s/map", layers_directory);
    snprintf(next_path, sizeof next_path, "%s/next", layers_directory);
    CHECK(mkdir(segments_directory, 0700) == 0 && mkdir(layers_directory, 0700) == 0);
    int full = 0, sync = 0;
    while (once(FULL, full))
        full++;
    while (once(SYNC, sync))
        sync++;
    CHECK(full > 15 && sync > 8);
    printf("%d full disks, %d failed syncs\n", full, sync);
    rmdir(segments_directory);
    rmdir(layers_directory);
    rmdir(root);
    return 0;
}
