/* check_seal.c: the stages of a seal, alone and of two volumes at once.
 *
 * What must hold: after an abort at any stage the volume reads and goes on as if no seal had begun, and finds all again
 * when it is opened anew; a stage out of turn changes nothing; and where a writer stamps a counter on one volume, then on
 * the other, the second is never ahead of the first in a cut, nor the first by two; a snapshot is refused before anything
 * is sealed where 256 numbers or fewer are left. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "volume/internal.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

enum { BLOCK = 4096, BLOCKS = 16, OWN_MAX = 16, PAIR = 2, CUTS = 500 };
enum last { BEGUN, HELD, CUT, RELEASED, SYNCED, LAST_COUNT };

typedef unsigned char id[ONION_UUID_BYTES];

struct disk {
    struct onion_volume *volume;
    id map, own[OWN_MAX], spare;
    uint32_t own_count;
};

static char root[256], segments_directory[300], layers_directory[300];
static int stop;

static void draw_id(unsigned char *out) { CHECK(getrandom(out, sizeof(id), 0) == sizeof(id)); }

static char *path_of(const unsigned char *of, char *path) {
    int length = sprintf(path, "%s/", layers_directory);
    for (int i = 0; i < ONION_UUID_BYTES; i++)
        length += sprintf(path + length, "%02x", of[i]);
    strcpy(path + length, ".map");
    return path;
}

static void open_disk(struct disk *disk) {
    char path[400];
    struct onion_head_source source = {.map_path = path_of(disk->map, path),
                                       .own = (const unsigned char(*)[ONION_UUID_BYTES])disk->own,
                                       .own_count = disk->own_count};
    draw_id(disk->spare);
    memcpy(source.map_id, disk->map, sizeof(id));
    memcpy(source.spare, disk->spare, sizeof(id));
    CHECK(onion_volume_new(BLOCK, BLOCKS * BLOCK, segments_directory, layers_directory, 0, 1, &disk->volume) == 0);
    CHECK(onion_volume_open_head(disk->volume, &source) == 0);
}

static void make_disk(struct disk *disk) {
    draw_id(disk->map);
    draw_id(disk->own[0]);
    disk->own_count = 1;
    open_disk(disk);
}

static int begin(struct disk *disk) {
    char path[400];
    return onion_volume_seal_begin(disk->volume, path_of(disk->spare, path), disk->spare);
}

/* ---- an abort at each stage ---- */

static void fill(struct disk *disk, uint64_t block, char with) {
    char bytes[BLOCK];
    memset(bytes, with, sizeof bytes);
    CHECK(onion_volume_write(disk->volume, block * BLOCK, BLOCK, bytes) == 0);
}

static void check(struct disk *disk, const char *expected) {
    char bytes[BLOCK];
    for (uint64_t block = 0; block < BLOCKS; block++) {
        CHECK(onion_volume_read(disk->volume, block * BLOCK, BLOCK, bytes) == 0);
        for (int i = 0; i < BLOCK; i++)
            CHECK(bytes[i] == expected[block]);
    }
}

/* Each call but `next` is out of turn. */
static void check_refused(struct disk *disk, enum last next) {
    struct onion_sealed sealed;
    if (next != HELD)
        CHECK(onion_volume_seal_hold(disk->volume) == -EINVAL);
    if (next != CUT)
        CHECK(onion_volume_seal_cut(disk->volume) == -EINVAL);
    if (next != SYNCED)
        CHECK(onion_volume_seal_sync(disk->volume, &sealed) == -EINVAL);
    CHECK(next == LAST_COUNT || onion_volume_seal_commit(disk->volume, disk->spare) == -EINVAL);
    if (next != CUT && next != RELEASED)
        onion_volume_seal_release(disk->volume); /* does nothing */
}

static void run_until(struct disk *disk, enum last last, char *expected) {
    struct onion_sealed sealed;
    CHECK(begin(disk) == 0);
    check_refused(disk, HELD);
    fill(disk, 2, expected[2] = 'c');
    if (last == BEGUN)
        return;
    CHECK(onion_volume_seal_hold(disk->volume) == 0);
    check_refused(disk, CUT);
    if (last == HELD)
        return;
    CHECK(onion_volume_seal_cut(disk->volume) == 0);
    check_refused(disk, RELEASED);
    if (last == CUT)
        return;
    onion_volume_seal_release(disk->volume);
    check_refused(disk, SYNCED);
    fill(disk, 2, expected[2] = 'd');
    fill(disk, 3, expected[3] = 'e');
    if (last == RELEASED)
        return;
    CHECK(onion_volume_seal_sync(disk->volume, &sealed) == 0 && sealed.map_frames > 0);
    check_refused(disk, LAST_COUNT);
    fill(disk, 4, expected[4] = 'f');
}

static void check_abort(enum last last) {
    struct disk disk;
    char expected[BLOCKS] = {0}, path[400];
    make_disk(&disk);
    fill(&disk, 0, expected[0] = 'a');
    CHECK(onion_volume_flush(disk.volume) == 0);
    fill(&disk, 1, expected[1] = 'b');
    run_until(&disk, last, expected);
    CHECK(onion_volume_seal_abort(disk.volume) == 0);
    CHECK(onion_volume_seal_abort(disk.volume) == -EINVAL);
    check(&disk, expected);
    CHECK(!onion_volume_poisoned(disk.volume));
    CHECK(onion_volume_has_spare(disk.volume) == (last == BEGUN || last == HELD));
    if (!onion_volume_has_spare(disk.volume)) { /* it is the old head's */
        memmove(disk.own + 1, disk.own, sizeof(id) * disk.own_count++);
        memcpy(disk.own[0], disk.spare, sizeof(id));
        draw_id(disk.spare);
        CHECK(onion_volume_set_spare(disk.volume, disk.spare) == 0);
    }
    CHECK(onion_volume_prepare(disk.volume, path_of(disk.spare, path), disk.spare) == 0);
    fill(&disk, 5, expected[5] = 'g');
    CHECK(onion_volume_flush(disk.volume) == 0);
    onion_volume_free(disk.volume);
    open_disk(&disk);
    check(&disk, expected);
    onion_volume_free(disk.volume);
}

/* Whoever closes in the middle frees what the seal held; nothing waits. */
static void check_close(enum last last) {
    struct disk disk;
    char expected[BLOCKS] = {0};
    make_disk(&disk);
    fill(&disk, 1, expected[1] = 'b');
    run_until(&disk, last, expected);
    onion_volume_seal_release(disk.volume);
    onion_volume_close(disk.volume);
    CHECK(onion_volume_seal_hold(disk.volume) == ONION_E_CLOSED);
    CHECK(onion_volume_seal_abort(disk.volume) == ONION_E_CLOSED);
    onion_volume_free(disk.volume);
}

/* ---- numbers of segments ---- */

enum { NUMBERS_KEPT = 256 };

/* A volume that made 65,000 files would take minutes, so the counts are set. */
static void check_last_numbers(void) {
    struct disk disk;
    char expected[BLOCKS] = {0};
    make_disk(&disk);
    fill(&disk, 0, expected[0] = 'a');
    uint32_t vacant = disk.volume->vacant_count, given = disk.volume->log.numbers_given;
    disk.volume->vacant_count -= onion_volume_numbers_left(disk.volume) - NUMBERS_KEPT;
    CHECK(begin(&disk) == ONION_E_NUMBERS);
    check_refused(&disk, LAST_COUNT); /* nothing was begun */
    disk.volume->vacant_count++;
    CHECK(begin(&disk) == 0);
    CHECK(onion_volume_seal_abort(disk.volume) == 0);
    disk.volume->vacant_count = vacant;
    disk.volume->log.numbers_given = ONION_SEGMENT_LAST - 2 * NUMBERS_KEPT;
    CHECK(begin(&disk) == ONION_E_NUMBERS);
    disk.volume->log.numbers_given = given;
    check(&disk, expected);
    CHECK(onion_volume_flush(disk.volume) == 0); /* it goes on */
    onion_volume_free(disk.volume);
}

/* ---- two volumes at one instant ---- */

static void *stamp(void *argument) {
    struct disk *pair = argument;
    for (uint64_t counter = 1; !__atomic_load_n(&stop, __ATOMIC_RELAXED); counter++)
        for (int i = 0; i < PAIR; i++)
            CHECK(onion_volume_write(pair[i].volume, 0, sizeof counter, &counter) == 0);
    return NULL;
}

/* The counter in the layer that a seal left behind. */
static uint64_t counter_of(const struct disk *disk, const struct onion_sealed *sealed) {
    char path[400];
    uint64_t counter = 0;
    struct onion_segment_ref segments[OWN_MAX];
    struct onion_segment_info infos[OWN_MAX];
    struct onion_layer_source source = {.map_path = path_of(disk->map, path),
                                        .map_length = sealed->map_length,
                                        .map_frames = sealed->map_frames,
                                        .map_crc = sealed->map_crc,
                                        .segments = segments};
    struct onion_volume *view;
    memcpy(source.map_id, disk->map, sizeof(id));
    uint32_t count = onion_volume_just_sealed(disk->volume, infos, OWN_MAX);
    CHECK(count <= OWN_MAX);
    for (uint32_t i = 0; i < count; i++)
        if (infos[i].slots) {
            memcpy(segments[source.segment_count].uuid, infos[i].uuid, sizeof(id));
            segments[source.segment_count++].slots = infos[i].slots;
        }
    CHECK(onion_volume_new(BLOCK, BLOCKS * BLOCK, segments_directory, layers_directory, 0, 0, &view) == 0);
    CHECK(onion_volume_add_layer(view, &source) == 0 && onion_volume_fold_layers(view) == 0);
    CHECK(onion_volume_read(view, 0, sizeof counter, &counter) == 0);
    onion_volume_free(view);
    return counter;
}

static void cut_both(struct disk *pair) {
    struct onion_volume *volumes[PAIR] = {pair[0].volume, pair[1].volume};
    static struct onion_seal_step steps[PAIR];
    char paths[PAIR][400];
    uint64_t counters[PAIR];
    uint32_t failed;
    for (int i = 0; i < PAIR; i++) {
        steps[i].volume = volumes[i];
        steps[i].map_path = path_of(pair[i].spare, paths[i]);
        steps[i].map_id = pair[i].spare;
    }
    onion_volumes_seal_begin(steps, PAIR);
    for (int i = 0; i < PAIR; i++)
        CHECK(steps[i].status == 0);
    struct onion_cut at = {.volumes = volumes, .count = PAIR};
    CHECK(onion_volumes_cut(&at, &failed) == 0);
    onion_volumes_seal_sync(steps, PAIR);
    for (int i = 0; i < PAIR; i++) {
        CHECK(steps[i].status == 0);
        counters[i] = steps[i].sealed.map_frames ? counter_of(&pair[i], &steps[i].sealed) : 0;
        memcpy(pair[i].map, pair[i].spare, sizeof(id));
        memcpy(pair[i].own[0], pair[i].spare, sizeof(id));
        draw_id(pair[i].spare);
        CHECK(onion_volume_seal_commit(volumes[i], pair[i].spare) == 0);
    }
    static uint64_t last;
    if (counters[0] || counters[1]) /* else nothing was written since the cut before */
        CHECK(counters[0] == counters[1] || counters[0] == counters[1] + 1 ||
              (counters[1] == 0 && counters[0] == last + 1) || (counters[0] == 0 && counters[1] == last));
    last = counters[0] ? counters[0] : last;
}

static void check_pair(void) {
    struct disk pair[PAIR];
    pthread_t writer;
    for (int i = 0; i < PAIR; i++)
        make_disk(&pair[i]);
    CHECK(pthread_create(&writer, NULL, stamp, pair) == 0);
    for (int round = 0; round < CUTS; round++)
        cut_both(pair);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    pthread_join(writer, NULL);
    for (int i = 0; i < PAIR; i++)
        onion_volume_free(pair[i].volume);
}

/* One of the two cannot be cut: neither is, and nobody waits. */
static void check_refused_pair(void) {
    struct disk pair[PAIR];
    uint32_t failed = 0;
    for (int i = 0; i < PAIR; i++) {
        make_disk(&pair[i]);
        fill(&pair[i], 0, 'a');
        CHECK(begin(&pair[i]) == 0);
    }
    struct onion_volume *volumes[PAIR] = {pair[0].volume, pair[1].volume};
    onion_volume_poison(volumes[1]);
    struct onion_cut at = {.volumes = volumes, .count = PAIR};
    CHECK(onion_volumes_cut(&at, &failed) == ONION_E_POISONED && failed == 1);
    fill(&pair[0], 0, 'b');
    for (int i = 0; i < PAIR; i++)
        CHECK(onion_volume_seal_abort(volumes[i]) == 0);
    CHECK(onion_volume_has_spare(volumes[0]) && onion_volume_flush(volumes[0]) == 0);
    for (int i = 0; i < PAIR; i++)
        onion_volume_free(volumes[i]);
}

/* ---- the frame ---- */

static void remove_files(const char *directory) {
    DIR *opened = opendir(directory);
    struct dirent *entry;
    while ((entry = readdir(opened)))
        unlinkat(dirfd(opened), entry->d_name, 0);
    closedir(opened);
    rmdir(directory);
}

int main(void) {
    const char *directory = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/check_seal.XXXXXX", directory ? directory : "/tmp");
    CHECK(mkdtemp(root));
    snprintf(segments_directory, sizeof segments_directory, "%s/segments", root);
    snprintf(layers_directory, sizeof layers_directory, "%s/layers", root);
    CHECK(mkdir(segments_directory, 0700) == 0 && mkdir(layers_directory, 0700) == 0);
    for (enum last last = BEGUN; last < LAST_COUNT; last++) {
        check_abort(last);
        check_close(last);
    }
    check_last_numbers();
    check_refused_pair();
    check_pair();
    remove_files(segments_directory);
    remove_files(layers_directory);
    rmdir(root);
    return 0;
}
