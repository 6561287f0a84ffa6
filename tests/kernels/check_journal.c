/* check_journal.c: a short history of one volume, run again and again by a child that is killed in front of the nth
 * system call, or in the nth gap between two verbs.
 *
 * What must hold: the next opening finds all that was acknowledged, flushed or not, and of the verb under way all or
 * nothing of each block. Of a snapshot and of a fold it is the catalog that says what happened: here a page that both
 * share. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "volume/journal.h"
#include "volume/volume.h"

#define CHECK(condition)                                                                               \
    do {                                                                                               \
        if (!(condition)) {                                                                            \
            fprintf(stderr, "%s:%d: not so: %s (kill %d)\n", __FILE__, __LINE__, #condition, kill_at); \
            abort();                                                                                   \
        }                                                                                              \
    } while (0)

enum { BLOCK = 4096, BLOCKS = 24 };

/* What a catalog would hold, and what the history had done when it was killed. */
struct catalog {
    int next_id;
    int map, own[8], own_count, spare; /* of the head; ids are numbers here */
    int has_lower, lower_map;
    struct onion_segment_ref lower_segments[2], inherited[2]; /* with a seal that was aborted before, a head has two */
    uint32_t lower_count, inherited_count;
    struct onion_sealed lower;
    uint64_t size_bytes, size_begun;
    unsigned char acknowledged[BLOCKS], begun[BLOCKS]; /* what each block is filled with */
};

static int kill_at = -1, calls;
static char root[200], segments_directory[300], layers_directory[300], dirty_path[320], paths[2][400];
static struct catalog *catalog;
static struct onion_volume *volume;

/* ---- the calls in front of which the child is killed: they stand before those of the C library ---- */

static void step(void) {
    if (calls++ == kill_at)
        raise(SIGKILL);
}

/* 1: the write of the next frame fails behind its bytes; 2: no file can be made shorter since. */
static int fails_behind_frame;

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    step();
    if (kill_at >= 0 && calls - 1 == kill_at - 1 && length > 1) /* the kill before the next one finds half of this */
        length /= 2;
    ssize_t written = syscall(SYS_pwrite64, fd, bytes, length, offset);
    if (fails_behind_frame == 1 && offset >= ONION_HEADER_BYTES && length % BLOCK) {
        fails_behind_frame = 2;
        errno = EIO;
        return -1;
    }
    return written;
}
static void write_beside(void);
static int syncs_left = -1; /* before one fails; -1: none does */

int fdatasync(int fd) {
    step();
    write_beside();
    if (syncs_left >= 0 && syncs_left-- == 0) {
        errno = EIO;
        return -1;
    }
    return fd < 0;
}
int fsync(int fd) {
    step();
    return fd < 0;
}
int fallocate(int fd, int mode, off_t offset, off_t length) {
    step();
    return (int)syscall(SYS_fallocate, fd, mode, offset, length);
}
int ftruncate(int fd, off_t length) {
    step();
    if (fails_behind_frame == 2) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_ftruncate, fd, length);
}
int rename(const char *from, const char *to) {
    step();
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlink(const char *path) {
    step();
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

/* ---- the catalog ---- */

static void id_of(int number, unsigned char *out) {
    memset(out, 0, ONION_UUID_BYTES);
    out[0] = (unsigned char)number;
    out[15] = 0x77;
}

static const char *path_of(const char *directory, int number, const char *ending, int which) {
    unsigned char id[ONION_UUID_BYTES];
    char name[2 * ONION_UUID_BYTES + 1];
    id_of(number, id);
    for (int i = 0; i < ONION_UUID_BYTES; i++)
        snprintf(name + 2 * i, 3, "%02x", id[i]);
    snprintf(paths[which], sizeof paths[which], "%s/%s%s", directory, name, ending);
    return paths[which];
}

/* As Store._look_at_spare: blocks in the spare are of a seal that was not committed. */
static void look_at_spare(void) {
    struct stat info;
    const char *path = path_of(segments_directory, catalog->spare, ".seg", 0);
    if (stat(path, &info) == 0 && info.st_size > ONION_HEADER_BYTES) {
        memmove(catalog->own + 1, catalog->own, sizeof catalog->own - sizeof *catalog->own);
        catalog->own[0] = catalog->spare;
        catalog->own_count++;
        catalog->spare = catalog->next_id++;
        return;
    }
    unlink(path);
    unlink(path_of(layers_directory, catalog->spare, ".map", 0));
}

static struct onion_layer_source lower_source(void) {
    struct onion_layer_source source = {.map_path = path_of(layers_directory, catalog->lower_map, ".map", 1),
                                        .map_length = catalog->lower.map_length,
                                        .map_frames = catalog->lower.map_frames,
                                        .map_crc = catalog->lower.map_crc,
                                        .segments = catalog->lower_segments,
                                        .segment_count = catalog->lower_count};
    id_of(catalog->lower_map, source.map_id);
    return source;
}

static void open_volume(void) {
    unsigned char own[8][ONION_UUID_BYTES];
    look_at_spare();
    for (int i = 0; i < catalog->own_count; i++)
        id_of(catalog->own[i], own[i]);
    CHECK(onion_volume_new(BLOCK, BLOCKS * BLOCK, segments_directory, layers_directory, 0, 1, &volume) == 0);
    if (catalog->has_lower) {
        struct onion_layer_source lower = lower_source();
        CHECK(onion_volume_add_layer(volume, &lower) == 0);
    }
    struct onion_head_source source = {.map_path = path_of(layers_directory, catalog->map, ".map", 0),
                                       .own = (const unsigned char(*)[ONION_UUID_BYTES])own,
                                       .own_count = (uint32_t)catalog->own_count,
                                       .inherited = catalog->inherited,
                                       .inherited_count = catalog->inherited_count,
                                       .dirty_path = dirty_path};
    id_of(catalog->map, source.map_id);
    id_of(catalog->spare, source.spare);
    CHECK(onion_volume_open_head(volume, &source) == 0);
    CHECK(onion_volume_free_own_slots(volume) == 0);
}

/* ---- the history ---- */

static void begin(uint64_t first, uint64_t count, unsigned char with) { memset(catalog->begun + first, with, count); }

static void acknowledge(void) {
    step();
    memcpy(catalog->acknowledged, catalog->begun, sizeof catalog->begun);
    step();
}

static void write_filled(uint64_t first, uint64_t count, unsigned char with) {
    static char bytes[BLOCKS * BLOCK];
    memset(bytes, with, count * BLOCK);
    begin(first, count, with);
    CHECK(onion_volume_write(volume, first * BLOCK, count * BLOCK, bytes) == 0);
    acknowledge();
}

static void write_scattered(unsigned char with) {
    static char bytes[3 * BLOCK];
    const uint64_t indices[3] = {17, 3, 11};
    memset(bytes, with, sizeof bytes);
    for (int i = 0; i < 3; i++)
        begin(indices[i], 1, with);
    CHECK(onion_volume_write_blocks(volume, indices, 3, bytes) == 0);
    acknowledge();
}

static void zero(uint64_t first, uint64_t count) {
    begin(first, count, 0);
    CHECK(onion_volume_zero(volume, first * BLOCK, count * BLOCK) == 0);
    acknowledge();
}

/* What another thread does while a flush syncs: then both halves have records. */
static int beside;

static void write_beside(void) {
    static unsigned char with = 200;
    if (!beside || beside++ > 2)
        return;
    int before = beside;
    beside = 0;
    write_filled(18, 1, with++);
    zero(19, 1);
    write_filled(19, 1, with++);
    zero(18, 1);
    beside = before;
}

static void flush(void) {
    beside = 1;
    CHECK(onion_volume_flush(volume) == 0);
    beside = 0;
}

static void some_changes(unsigned char with) {
    write_filled(2, 5, with);
    zero(4, 2);
    write_scattered(with + 1);
    flush();
    write_filled(0, 3, with + 2);
    zero(10, 3);
    write_filled(20, 1, with + 3);
}

/* A snapshot; changes are made while its outcome is open. */
static void seal(int commits, unsigned char with) {
    struct onion_sealed sealed;
    struct onion_segment_info infos[8];
    unsigned char id[ONION_UUID_BYTES];
    int next = catalog->spare, spare = catalog->next_id++;
    id_of(next, id);
    beside = 1;
    CHECK(onion_volume_seal(volume, path_of(layers_directory, next, ".map", 0), id, &sealed) == 0);
    beside = 0;
    write_filled(6, 2, with);
    zero(0, 1);
    uint32_t sealed_count = onion_volume_just_sealed(volume, infos, 8);
    CHECK(sealed_count == (uint32_t)catalog->own_count && sealed_count <= 2);
    id_of(spare, id);
    if (commits) {
        struct catalog after = *catalog;
        after.has_lower = 1;
        after.lower_map = catalog->map, after.lower_count = sealed_count;
        for (uint32_t i = 0; i < sealed_count; i++) {
            memcpy(after.lower_segments[i].uuid, infos[i].uuid, ONION_UUID_BYTES);
            after.lower_segments[i].slots = infos[i].slots;
        }
        after.lower = sealed;
        after.map = after.own[0] = next, after.own_count = 1, after.spare = spare;
        step();
        *catalog = after;
        step();
        write_filled(8, 2, with + 1);
        CHECK(onion_volume_seal_commit(volume, id) == 0);
    } else {
        write_filled(8, 2, with + 1);
        CHECK(onion_volume_seal_abort(volume) == 0);
        memmove(catalog->own + 1, catalog->own, sizeof catalog->own - sizeof *catalog->own);
        catalog->own[0] = next, catalog->own_count++, catalog->spare = spare;
        CHECK(onion_volume_set_spare(volume, id) == 0);
    }
    step();
}

/* A seal of which a group comes to nothing before it is durable: after the cut the old head goes on with both segments. */
static void seal_undone(int is_cut, unsigned char with) {
    unsigned char id[ONION_UUID_BYTES];
    id_of(catalog->spare, id);
    beside = 1;
    CHECK(onion_volume_seal_begin(volume, path_of(layers_directory, catalog->spare, ".map", 0), id) == 0);
    beside = 0;
    write_filled(5, 2, with);
    CHECK(onion_volume_seal_hold(volume) == 0);
    if (is_cut)
        CHECK(onion_volume_seal_cut(volume) == 0);
    onion_volume_seal_release(volume);
    write_filled(6, 2, with + 1);
    zero(0, 1);
    CHECK(onion_volume_seal_abort(volume) == 0);
    write_filled(8, 2, with + 2);
    if (is_cut) {
        int spare = catalog->next_id++;
        memmove(catalog->own + 1, catalog->own, sizeof catalog->own - sizeof *catalog->own);
        catalog->own[0] = catalog->spare, catalog->own_count++, catalog->spare = spare;
        id_of(spare, id);
        CHECK(onion_volume_set_spare(volume, id) == 0);
    }
    step();
}

/* Folds the lower layer, if there is one, into the head; else it is compacted. */
static void rewrite(int commits, unsigned char with) {
    struct onion_sealed written;
    unsigned char id[ONION_UUID_BYTES];
    struct onion_layer_source lower = lower_source();
    int map = catalog->next_id++;
    id_of(map, id);
    CHECK(onion_volume_rewrite(volume, path_of(layers_directory, map, ".map", 0), id,
                               catalog->has_lower ? &lower : NULL, 0, &written) == 0);
    write_filled(13, 2, with);
    zero(14, 3);
    if (commits) {
        struct catalog after = *catalog;
        after.map = map;
        if (after.has_lower) {
            memcpy(after.inherited, after.lower_segments, sizeof after.inherited);
            after.inherited_count = after.lower_count;
        }
        after.has_lower = 0;
        step();
        *catalog = after;
        step();
        write_filled(16, 1, with + 1);
        CHECK(onion_volume_rewrite_commit(volume) == 0);
    } else {
        CHECK(onion_volume_rewrite_abort(volume) == 0);
    }
    step();
}

static void resize(uint64_t size_bytes) {
    catalog->size_begun = size_bytes;
    CHECK(onion_volume_resize(volume, size_bytes) == 0);
    step();
    catalog->size_bytes = size_bytes;
    for (uint64_t block = size_bytes / BLOCK + 1; block < BLOCKS; block++)
        catalog->begun[block] = 0;
    memcpy(catalog->acknowledged, catalog->begun, sizeof catalog->begun);
    step();
}

static void history(void) {
    some_changes(1);
    seal(0, 11);
    some_changes(21);
    rewrite(0, 31);
    rewrite(1, 41);
    resize(20 * BLOCK + 512);
    write_filled(1, 2, 45);
    flush();
    resize(BLOCKS * BLOCK);
    some_changes(51);
    seal(1, 61);
    some_changes(71);
    seal_undone(0, 75);
    seal_undone(1, 78);
    rewrite(0, 81);
    write_filled(0, 4, 85);
    rewrite(1, 91);
    some_changes(101);
}

static void check_contents(void) {
    unsigned char bytes[BLOCK];
    uint64_t size = onion_volume_size(volume);
    CHECK(size == catalog->size_bytes || size == catalog->size_begun);
    int resizing = catalog->size_bytes != catalog->size_begun, shrunk = size < catalog->size_bytes;
    for (uint64_t block = 0; block < size / BLOCK; block++) {
        CHECK(onion_volume_read(volume, block * BLOCK, BLOCK, bytes) == 0);
        int old = bytes[0] == catalog->acknowledged[block], new = bytes[0] == catalog->begun[block];
        CHECK(old || new || (resizing && size > catalog->size_bytes && block >= catalog->size_bytes / BLOCK));
        CHECK(!resizing || shrunk || old || block >= catalog->size_bytes / BLOCK);
        catalog->acknowledged[block] = catalog->begun[block] = bytes[0]; /* this was said to be there */
    }
    catalog->size_bytes = catalog->size_begun = size;
}

static void empty(const char *directory) {
    DIR *opened = opendir(directory);
    struct dirent *entry;
    while ((entry = readdir(opened)))
        unlinkat(dirfd(opened), entry->d_name, 0);
    closedir(opened);
}

static void new_catalog(void) {
    memset(catalog, 0, sizeof *catalog);
    catalog->map = 1, catalog->own[0] = 2, catalog->own_count = 1, catalog->spare = 3, catalog->next_id = 4;
    catalog->size_bytes = catalog->size_begun = BLOCKS * BLOCK;
}

/* A history that ends at a kill, and what is found after it: twice, since the first opening may be killed too. Returns
 * whether the kill came before the end. */
static int once(int at) {
    new_catalog();
    int status = 0, killed = 0;
    for (int opening = 0; opening < 3; opening++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            calls = 0;
            kill_at = opening == 0 ? at : opening == 1 ? at % 7 : -1;
            open_volume();
            if (opening == 0) {
                history();
            } else {
                check_contents();
                write_filled(5, 1, 120); /* goes on, and is there too */
                check_contents();
            }
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child);
        kill_at = at;
        CHECK(WIFEXITED(status) ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGKILL && opening < 2);
        killed |= opening == 0 && WIFSIGNALED(status);
    }
    empty(segments_directory);
    empty(layers_directory);
    empty(root);
    kill_at = -1;
    return killed;
}

/* Runs a part of a history in a process of its own, which ends without a close, as if it were killed; or it is killed in
 * front of a system call. Returns whether it came to its end. */
static int in_child_until(int at, void (*part)(void)) {
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        calls = 0;
        kill_at = at;
        open_volume();
        part();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGKILL && at >= 0);
    return WIFEXITED(status);
}

static void in_child(void (*part)(void)) { CHECK(in_child_until(-1, part)); }

static int failing;

static void fail_a_flush(void) {
    some_changes(1);
    syncs_left = failing;
    beside = 1;
    CHECK(onion_volume_flush(volume) < 0);
}

/* A sync fails, of the segment or of the frame, while others write: the records of both halves go on from a frame that is
 * there or not. The opening that finds them is killed at each of its steps, and the next one finds them too. */
static void check_failed_syncs(void) {
    for (failing = 0; failing < 2; failing++)
        for (int at = 0, is_whole = 0; !is_whole; at++) {
            new_catalog();
            in_child(fail_a_flush);
            is_whole = in_child_until(at, check_contents);
            in_child(check_contents);
            empty(segments_directory);
            empty(layers_directory);
            empty(root);
        }
}

static void fail_behind_a_frame(void) {
    write_filled(2, 5, 1);
    fails_behind_frame = 1;
    beside = 1;
    CHECK(onion_volume_flush(volume) < 0);
    CHECK(fails_behind_frame == 2);
}

/* The frame of a flush that failed is in the log, which could not be cut: what others wrote meanwhile goes on from it. */
static void check_failed_write(void) {
    new_catalog();
    in_child(fail_behind_a_frame);
    in_child(check_contents);
    in_child(check_contents);
    empty(segments_directory);
    empty(layers_directory);
    empty(root);
}

static void copy_file(const char *from, const char *to) {
    char command[700];
    snprintf(command, sizeof command, "cp '%s' '%s'", from, to);
    CHECK(system(command) == 0);
}

static void leave_records(void) {
    write_filled(0, 4, 1);
    zero(2, 1);
}

static void take_its_slots(void) {
    zero(0, 4);
    CHECK(onion_volume_flush(volume) == 0);
    write_filled(8, 8, 9);
    CHECK(onion_volume_flush(volume) == 0);
}

/* The file of an earlier death is put back by hand over what was flushed since: it would give blocks the slots of others. */
static void check_put_back(void) {
    char kept[340];
    snprintf(kept, sizeof kept, "%s.kept", dirty_path);
    new_catalog();
    in_child(leave_records);
    copy_file(dirty_path, kept);
    in_child(take_its_slots);
    copy_file(kept, dirty_path);
    in_child(check_contents);
    empty(segments_directory);
    empty(layers_directory);
    empty(root);
}

int main(void) {
    const char *directory = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/check_journal.XXXXXX", directory ? directory : "/tmp");
    CHECK(mkdtemp(root));
    snprintf(segments_directory, sizeof segments_directory, "%s/segments", root);
    snprintf(layers_directory, sizeof layers_directory, "%s/layers", root);
    snprintf(dirty_path, sizeof dirty_path, "%s/dirty", root);
    CHECK(mkdir(segments_directory, 0700) == 0 && mkdir(layers_directory, 0700) == 0);
    catalog = mmap(NULL, sizeof *catalog, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(catalog != MAP_FAILED);
    check_failed_syncs();
    check_failed_write();
    check_put_back();
    int kills = 0;
    while (once(kills))
        kills++;
    CHECK(kills > 150);
    printf("%d kills\n", kills);
    rmdir(segments_directory);
    rmdir(layers_directory);
    rmdir(root);
    return 0;
}
