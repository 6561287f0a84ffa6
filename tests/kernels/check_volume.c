/* check_volume.c: one volume under everything at once: writers, readers, a flusher, a thread that seals and merges, one
 * that asks for free slots, and at the end a close under all of them. Then the store is opened again.
 *
 * What must hold: a word that is read belongs to its block, and to a version that was begun and was not followed by
 * one that was acknowledged before the read; after a flush and a close all is there; nothing poisons the volume.
 *
 * tools/check_kernels.sh builds and runs it; by hand, ./check_volume SECONDS SEED. The files are made in $TMPDIR or
 * /tmp. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/epoch.h"
#include "volume/volume.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

enum { BLOCK = 4096, WORDS = BLOCK / 8, BLOCKS = 1800, WRITERS = 3, READERS = 2, LAYERS_MAX = 512, OWN_MAX = 64 };
#define TRIM_EVERY 5 /* versions that are multiples of it are trims */

typedef unsigned char id[ONION_UUID_BYTES];

struct layer {
    char path[4096];
    struct onion_layer_source source;
    struct onion_segment_ref *segments;
};

static char root[256], segments_directory[300], layers_directory[300];
static struct onion_volume *volume;
static struct layer layers[LAYERS_MAX];
static uint32_t layer_count;
static struct layer head; /* its path and map id, and the segments that it inherited */
static id own[OWN_MAX], spare;
static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t own_count;
static uint64_t begun[BLOCKS], acknowledged[BLOCKS];
static int stop, closing;

static uint32_t draw(unsigned *seed, uint32_t below) { return (uint32_t)rand_r(seed) % below; }
static int stopped(void) { return __atomic_load_n(&stop, __ATOMIC_RELAXED); }
/* A verb's status while all run: only the close at the end may refuse it. */
static int done(int64_t status) {
    CHECK(status >= 0 || (status == ONION_E_CLOSED && __atomic_load_n(&closing, __ATOMIC_SEQ_CST)));
    return status >= 0;
}

static void name_map(struct layer *layer, const unsigned char *map_id) {
    memcpy(layer->source.map_id, map_id, sizeof(id));
    snprintf(layer->path, sizeof layer->path, "%s/%016llx.map", layers_directory,
             (unsigned long long)*(uint64_t *)layer->source.map_id);
    layer->source.map_path = layer->path;
}

static void new_map(struct layer *layer) {
    id drawn;
    CHECK(getrandom(drawn, sizeof drawn, 0) == sizeof drawn);
    name_map(layer, drawn);
}

static void new_spare(void) {
    pthread_mutex_lock(&spare_lock);
    CHECK(getrandom(spare, sizeof spare, 0) == sizeof spare);
    pthread_mutex_unlock(&spare_lock);
}

/* ---- writers and readers ---- */

static uint64_t word_of(uint64_t block, uint64_t version) { return version % TRIM_EVERY ? block << 40 | version : 0; }

static void fill(uint64_t *words, uint64_t block, uint64_t version) {
    for (int i = 0; i < WORDS; i++)
        words[i] = word_of(block, version);
}

static int write_one(uint64_t block, uint64_t *words, unsigned *seed) {
    uint64_t version = begun[block] + 1;
    __atomic_store_n(&begun[block], version, __ATOMIC_SEQ_CST);
    if (version % TRIM_EVERY == 0)
        return onion_volume_zero(volume, block * BLOCK, BLOCK);
    fill(words, block, version);
    if (draw(seed, 3) == 0)
        return onion_volume_write_blocks(volume, &block, 1, words);
    if (draw(seed, 3) == 0) { /* in two parts */
        int status = onion_volume_write(volume, block * BLOCK, 1000, words);
        return status < 0 ? status : onion_volume_write(volume, block * BLOCK + 1000, BLOCK - 1000, words + 125);
    }
    return onion_volume_write(volume, block * BLOCK, BLOCK, words);
}

/* Each writer has blocks of its own, in all ranges. */
static void *write_blocks(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint64_t words[16 * WORDS], indices[16];
    while (!stopped()) {
        uint64_t first = draw(&seed, BLOCKS / WRITERS - 16) * WRITERS + seed % 1 + (uintptr_t)argument % WRITERS;
        if (draw(&seed, 4)) {
            if (!done(write_one(first, words, &seed)))
                return NULL;
            __atomic_store_n(&acknowledged[first], begun[first], __ATOMIC_SEQ_CST);
            continue;
        }
        for (int i = 0; i < 16; i++) {
            uint64_t block = indices[i] = first + (uint64_t)i * WRITERS;
            uint64_t version = begun[block] + 1;
            version += version % TRIM_EVERY == 0;
            __atomic_store_n(&begun[block], version, __ATOMIC_SEQ_CST);
            fill(words + i * WORDS, block, version);
        }
        if (!done(onion_volume_write_blocks(volume, indices, 16, words)))
            return NULL;
        for (int i = 0; i < 16; i++)
            __atomic_store_n(&acknowledged[indices[i]], begun[indices[i]], __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void check_word(uint64_t block, uint64_t word, uint64_t low, uint64_t high) {
    if (word == 0) {
        CHECK(low == 0 || high / TRIM_EVERY > (low - 1) / TRIM_EVERY);
        return;
    }
    CHECK(word >> 40 == block);
    CHECK((word & ((1ull << 40) - 1)) >= low && (word & ((1ull << 40) - 1)) <= high);
}

static void *read_blocks(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint64_t words[8 * WORDS], indices[8], low[8];
    while (!stopped()) {
        uint64_t first = draw(&seed, BLOCKS - 8);
        int many = draw(&seed, 2) == 0;
        for (int i = 0; i < 8; i++) {
            indices[i] = many ? draw(&seed, BLOCKS) : first + (uint64_t)i;
            low[i] = __atomic_load_n(&acknowledged[indices[i]], __ATOMIC_SEQ_CST);
        }
        if (!done(many ? onion_volume_read_blocks(volume, indices, 8, words)
                       : onion_volume_read(volume, first * BLOCK, sizeof words, words)))
            return NULL;
        for (int i = 0; i < 8 * WORDS; i++)
            check_word(indices[i / WORDS], words[i], low[i / WORDS],
                       __atomic_load_n(&begun[indices[i / WORDS]], __ATOMIC_SEQ_CST));
    }
    return NULL;
}

static void *flush(void *argument) {
    (void)argument;
    while (!stopped() && done(onion_volume_flush(volume)))
        usleep(300);
    return NULL;
}

/* ---- seal and merge ---- */

/* What was the spare is the old head's, which gets another, unless the heads were never swapped. */
static void abort_seal(int was_cut) {
    if (was_cut) {
        memcpy(own[own_count++], spare, sizeof(id));
        new_spare();
        CHECK(own_count < OWN_MAX);
    }
    if (done(onion_volume_seal_abort(volume)) && was_cut)
        done(onion_volume_set_spare(volume, spare));
}

/* A seal in stages. 1: it is synced; 0: it was aborted after one of them, or refused. */
static int seal_in_stages(const struct layer *next, struct onion_sealed *sealed, unsigned *seed) {
    uint32_t last = draw(seed, 8); /* the stage that is the last, or else all are run */
    if (!done(onion_volume_seal_begin(volume, next->path, next->source.map_id)))
        return 0;
    CHECK(onion_volume_seal_cut(volume) < 0);
    usleep(draw(seed, 1000));
    int status = last == 0 ? 1 : onion_volume_seal_hold(volume);
    int was_cut = status == 0 && last != 1 && done(status = onion_volume_seal_cut(volume));
    if (status == 0 && last != 2)
        onion_volume_seal_release(volume);
    if (status == 0 && last > 3) {
        usleep(draw(seed, 1000));
        if (done(onion_volume_seal_sync(volume, sealed)))
            return 1;
    }
    done(status);
    if (onion_volume_closed(volume)) {
        onion_volume_seal_release(volume);
        return 0;
    }
    abort_seal(was_cut);
    return 0;
}

static void seal(unsigned *seed) {
    static struct onion_segment_info infos[ONION_SEGMENT_LAST];
    struct layer next = {.path = ""};
    struct onion_sealed sealed;
    name_map(&next, spare);
    int is_sealed = draw(seed, 2) ? seal_in_stages(&next, &sealed, seed)
                                  : done(onion_volume_seal(volume, next.path, next.source.map_id, &sealed));
    if (!is_sealed)
        return;
    usleep(draw(seed, 2000));
    if (draw(seed, 4) == 0 || own_count == OWN_MAX) {
        abort_seal(1);
        return;
    }
    uint32_t count = onion_volume_segments(volume, infos, ONION_SEGMENT_LAST);
    struct layer *layer = &layers[layer_count++];
    *layer = head;
    layer->segments = realloc(head.segments, (head.source.segment_count + own_count) * sizeof *layer->segments);
    for (uint32_t i = 0; i < own_count; i++)
        for (uint32_t k = 0; k < count; k++)
            if (!memcmp(infos[k].uuid, own[i], sizeof(id)) && infos[k].slots) {
                struct onion_segment_ref *ref = &layer->segments[layer->source.segment_count++];
                memcpy(ref->uuid, own[i], sizeof(id));
                ref->slots = infos[k].slots;
            }
    layer->source.map_path = layer->path;
    layer->source.segments = layer->segments;
    layer->source.map_length = sealed.map_length;
    layer->source.map_frames = sealed.map_frames;
    layer->source.map_crc = sealed.map_crc;
    head = next;
    own_count = 1;
    memcpy(own[0], spare, sizeof(id));
    new_spare();
    done(onion_volume_seal_commit(volume, spare));
}

/* Makes the files of the next head beforehand, now and then, or is too late for it. */
static void *prepare(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    struct layer next;
    while (!stopped()) {
        pthread_mutex_lock(&spare_lock);
        name_map(&next, spare);
        pthread_mutex_unlock(&spare_lock);
        usleep(draw(&seed, 1000));
        onion_volume_start_writing(volume);
        int status = onion_volume_prepare(volume, next.path, next.source.map_id);
        if (status != -EBUSY && !done(status))
            return NULL;
        usleep(draw(&seed, 3000));
    }
    return NULL;
}

/* What the head inherited, and no block is in any more: its number is another segment's soon. */
static void drop_unused(void) {
    static id unused[ONION_SEGMENT_LAST], dropped[ONION_SEGMENT_LAST];
    struct onion_below_source below = {.keep_base = 1, .dropped = dropped};
    int64_t count = onion_volume_unused_segments(volume, unused, ONION_SEGMENT_LAST);
    if (!done(count))
        return;
    for (uint32_t i = 0; i < head.source.segment_count; i++)
        for (int64_t k = 0; k < count; k++)
            if (!memcmp(head.segments[i].uuid, unused[k], sizeof(id))) {
                memcpy(dropped[below.dropped_count++], unused[k], sizeof(id));
                head.segments[i--] = head.segments[--head.source.segment_count];
                break;
            }
    if (done(onion_volume_prepare_below(volume, &below)))
        done(onion_volume_commit_below(volume));
}

static void merge(unsigned *seed) {
    if (!layer_count)
        return;
    struct layer *lower = &layers[layer_count - 1], next = head;
    struct onion_sealed written;
    new_map(&next);
    if (!done(onion_volume_rewrite(volume, next.path, next.source.map_id, &lower->source, layer_count == 1, &written)))
        return;
    usleep(draw(seed, 2000));
    if (draw(seed, 4) == 0) {
        done(onion_volume_rewrite_abort(volume));
        return;
    }
    uint32_t count = next.source.segment_count + lower->source.segment_count;
    next.segments = realloc(next.segments, (count + 1) * sizeof *next.segments);
    for (uint32_t i = 0; i < lower->source.segment_count; i++)
        next.segments[next.source.segment_count++] = lower->segments[i];
    free(lower->segments);
    unlink(head.path);
    unlink(lower->path);
    head = next;
    layer_count--;
    if (done(onion_volume_rewrite_commit(volume)))
        drop_unused();
}

static void *change_heads(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    while (!stopped() && !__atomic_load_n(&closing, __ATOMIC_SEQ_CST) && layer_count < LAYERS_MAX) {
        if (draw(&seed, 3))
            seal(&seed);
        else
            merge(&seed);
        usleep(draw(&seed, 3000));
    }
    return NULL;
}

static void *ask(void *argument) {
    unsigned seed = (unsigned)(uintptr_t)argument;
    static struct onion_segment_info infos[ONION_SEGMENT_LAST];
    while (!stopped() && !__atomic_load_n(&closing, __ATOMIC_SEQ_CST)) {
        unsigned char *bitmap;
        uint64_t bits, next, records, needed;
        struct onion_run runs[64];
        uint32_t count = onion_volume_segments(volume, infos, ONION_SEGMENT_LAST);
        if (count && done(onion_volume_live_slots(volume, infos[draw(&seed, count)].uuid, &bitmap, &bits)))
            free(bitmap);
        done(onion_volume_runs(volume, 0, BLOCKS, runs, 64, &next));
        done(onion_volume_log_records(volume, &records, &needed));
        done(onion_volume_wait_for_readers(volume));
        usleep(2000);
    }
    return NULL;
}

/* ---- the frame ---- */

static void open_volume(void) {
    struct onion_head_source source = {.map_path = head.path,
                                       .inherited = head.segments,
                                       .inherited_count = head.source.segment_count,
                                       .own = (const unsigned char(*)[ONION_UUID_BYTES])own,
                                       .own_count = own_count};
    memcpy(source.map_id, head.source.map_id, sizeof(id));
    new_spare(); /* the old one may have files */
    memcpy(source.spare, spare, sizeof(id));
    CHECK(onion_volume_new(BLOCK, BLOCKS * BLOCK, segments_directory, layers_directory, getpid() % 2, 1, &volume) == 0);
    for (uint32_t i = 0; i < layer_count; i++)
        CHECK(onion_volume_add_layer(volume, &layers[i].source) == 0);
    CHECK(onion_volume_open_head(volume, &source) == 0);
    CHECK(onion_volume_free_own_slots(volume) == 0);
}

static void check_all(void) {
    uint64_t words[WORDS];
    for (uint64_t block = 0; block < BLOCKS; block++) {
        CHECK(onion_volume_read(volume, block * BLOCK, BLOCK, words) == 0);
        for (int i = 0; i < WORDS; i++)
            CHECK(words[i] == word_of(block, begun[block]));
    }
}

/* Runs all threads for a while. close_under_way: close while they are at it, instead of stopping them before. */
static void run(double seconds, unsigned seed, int close_under_way) {
    void *(*work[])(void *) = {write_blocks, write_blocks, write_blocks, read_blocks, read_blocks,
                               flush,        change_heads, prepare,      ask};
    enum { THREADS = sizeof work / sizeof *work };
    pthread_t threads[THREADS];
    stop = closing = 0;
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, work[i], (void *)(i + WRITERS * 1000 * (uintptr_t)seed)) == 0);
    usleep((useconds_t)(seconds * 1e6));
    if (close_under_way) {
        __atomic_store_n(&closing, 1, __ATOMIC_SEQ_CST);
        onion_volume_close(volume);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

/* ---- leaves that are replaced while write_blocks looks at them ---- */

static void *split_runs(void *argument) {
    unsigned seed = 7;
    static uint64_t words[WORDS];
    (void)argument;
    while (!stopped()) {
        uint64_t block = draw(&seed, 256) * 2;
        CHECK(onion_volume_write(volume, block * BLOCK, BLOCK, words) == 0);
        CHECK(onion_volume_zero(volume, block * BLOCK, BLOCK) == 0);
        if (seed % 64 == 0)
            CHECK(onion_volume_flush(volume) == 0);
    }
    return NULL;
}

static void *write_beside(void *argument) {
    static uint64_t words[128 * WORDS], indices[128];
    (void)argument;
    for (int i = 0; i < 128; i++)
        indices[i] = (uint64_t)i * 4 + 1;
    while (!stopped())
        CHECK(onion_volume_write_blocks(volume, indices, 128, words) == 0);
    return NULL;
}

static void check_leaves(double seconds) {
    pthread_t threads[2];
    stop = 0;
    CHECK(pthread_create(&threads[0], NULL, split_runs, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, write_beside, NULL) == 0);
    usleep((useconds_t)(seconds * 1e6));
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
}

static void remove_files(const char *directory) {
    DIR *opened = opendir(directory);
    struct dirent *entry;
    while ((entry = readdir(opened)))
        unlinkat(dirfd(opened), entry->d_name, 0);
    closedir(opened);
    rmdir(directory);
}

int main(int argument_count, char **arguments) {
    double seconds = argument_count > 1 ? atof(arguments[1]) : 2;
    unsigned seed = argument_count > 2 ? (unsigned)atoi(arguments[2]) : 1;
    const char *directory = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/check_volume.XXXXXX", directory ? directory : "/tmp");
    CHECK(mkdtemp(root));
    snprintf(segments_directory, sizeof segments_directory, "%s/segments", root);
    snprintf(layers_directory, sizeof layers_directory, "%s/layers", root);
    CHECK(mkdir(segments_directory, 0700) == 0 && mkdir(layers_directory, 0700) == 0);
    new_map(&head);
    own_count = 1;
    CHECK(getrandom(own[0], sizeof(id), 0) == sizeof(id) && getrandom(spare, sizeof(id), 0) == sizeof(id));
    open_volume();
    check_leaves(seconds / 5); /* writes zeros only */
    for (int round = 0; round < 3; round++) {
        run(seconds / 5, seed + (unsigned)round, 0);
        check_all();
        CHECK(onion_volume_flush(volume) == 0);
        onion_volume_free(volume);
        open_volume();
        check_all();
    }
    run(seconds / 5, seed + 3, 1);
    onion_volume_free(volume);
    for (uint32_t i = 0; i < layer_count; i++)
        free(layers[i].segments);
    free(head.segments);
    remove_files(segments_directory);
    remove_files(layers_directory);
    rmdir(root);
    return 0;
}
