/* The longest pause of two writers while snapshots are taken, without Python: the data path alone, as a server would
 * use it.
 *
 *     writer_pause DIRECTORY ROUNDS
 *
 * Two threads write 4 KiB at random places; a third seals the head again and again, with one fdatasync of a file as
 * the catalog's commit, and makes the files of the next head, as the engine does. In turn with that it sleeps as long,
 * and flushes what the writers wrote meanwhile. Prints a line for each: `snapshot`, `idle` or `flush`, microseconds that
 * it took, that the longest write beside it took, and of these that the writer was runnable without a CPU (other
 * programs had it: not the engine's doing). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "volume/volume.h"

enum { BLOCK = 4096, WRITERS = 2, ROUNDS_MAX = 10000, GAP_US = 5000, THINK_US = 20 };
enum { SNAPSHOT, IDLE, FLUSH, KINDS };
/* Small, and a little time between writes: else the writers outrun the disk, and the kernel's throttling of dirty pages
 * is all that is seen. */
#define SIZE_BYTES (64ull << 20)

struct pause {
    double took_us, longest_us, waited_us;
};

static struct onion_volume *volume;
static struct pause pauses[WRITERS][KINDS * ROUNDS_MAX];
static atomic_int window; /* odd while something is under way: 2 * number + 1 */
static unsigned char spare[ONION_UUID_BYTES];
static atomic_int stop;

static void must(int status, const char *what) {
    if (status < 0) {
        fprintf(stderr, "%s: %d\n", what, status);
        exit(1);
    }
}

static double now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

/* Microseconds that this thread was runnable and had no CPU. */
static double cpu_wait_us(int fd) {
    char text[96] = "";
    uint64_t ran = 0, waited = 0;
    if (pread(fd, text, sizeof text - 1, 0) <= 0 || sscanf(text, "%" SCNu64 " %" SCNu64, &ran, &waited) != 2)
        return 0;
    return waited / 1e3;
}

static void *writer(void *argument) {
    struct pause *mine = argument;
    unsigned char block[BLOCK];
    uint64_t random_state = (uint64_t)(uintptr_t)argument | 1;
    int fd = open("/proc/thread-self/schedstat", O_RDONLY);
    memset(block, 7, sizeof block);
    while (!atomic_load(&stop)) {
        random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t offset = (random_state >> 20) % (SIZE_BYTES / BLOCK) * BLOCK;
        double waited = cpu_wait_us(fd), start = now_us();
        int before = atomic_load(&window);
        must(onion_volume_write(volume, offset, BLOCK, block), "write");
        double longest = now_us() - start;
        int after = atomic_load(&window), at = before % 2 ? before : after % 2 ? after : -1;
        if (at >= 0 && longest > mine[at / 2].longest_us) {
            mine[at / 2].longest_us = longest;
            mine[at / 2].waited_us = cpu_wait_us(fd) - waited;
        }
        usleep(THINK_US);
    }
    close(fd);
    return NULL;
}

static void name_map(const char *directory, char *path, size_t size) {
    snprintf(path, size, "%s/layers/", directory);
    for (int i = 0; i < ONION_UUID_BYTES; i++)
        snprintf(path + strlen(path), 3, "%02x", spare[i]);
}

static void snapshot(const char *directory, int catalog) {
    char map_path[4096];
    unsigned char next[ONION_UUID_BYTES], row[BLOCK] = {0};
    struct onion_sealed sealed;
    must((int)getrandom(next, sizeof next, 0), "getrandom");
    name_map(directory, map_path, sizeof map_path);
    onion_volume_start_writing(volume);
    must(onion_volume_seal(volume, map_path, spare, &sealed), "seal");
    must((int)pwrite(catalog, row, sizeof row, 0), "pwrite");
    must(fdatasync(catalog), "fdatasync");
    must(onion_volume_seal_commit(volume, next), "commit");
    memcpy(spare, next, sizeof spare);
    name_map(directory, map_path, sizeof map_path);
    must(onion_volume_prepare(volume, map_path, spare), "prepare");
}

static void open_volume(const char *directory) {
    char segments[4096], layers[4096], map_path[4200];
    unsigned char own[1][ONION_UUID_BYTES];
    struct onion_head_source head = {.own = own, .own_count = 1};
    snprintf(segments, sizeof segments, "%s/segments", directory);
    snprintf(layers, sizeof layers, "%s/layers", directory);
    snprintf(map_path, sizeof map_path, "%s/layers/head.map", directory);
    must(mkdir(segments, 0700) | mkdir(layers, 0700), "mkdir");
    must((int)getrandom(own, sizeof own, 0), "getrandom");
    must((int)getrandom(head.map_id, sizeof head.map_id, 0), "getrandom");
    must((int)getrandom(spare, sizeof spare, 0), "getrandom");
    memcpy(head.spare, spare, sizeof spare);
    head.map_path = map_path;
    must(onion_volume_new(BLOCK, SIZE_BYTES, segments, layers, 0, 1, &volume), "new");
    must(onion_volume_open_head(volume, &head), "open_head");
}

static void report(int window_number, double took) {
    static const char *const kinds[KINDS] = {"snapshot", "idle", "flush"};
    struct pause *worst = &pauses[0][window_number];
    for (int w = 1; w < WRITERS; w++)
        if (pauses[w][window_number].longest_us > worst->longest_us)
            worst = &pauses[w][window_number];
    printf("%s %.1f %.1f %.1f\n", kinds[window_number % KINDS], took, worst->longest_us, worst->waited_us);
}

static void do_one(int kind, const char *directory, int catalog, double sleep_us) {
    if (kind == SNAPSHOT)
        snapshot(directory, catalog);
    else if (kind == IDLE)
        usleep((useconds_t)sleep_us);
    else
        must(onion_volume_flush(volume), "flush");
}

int main(int argc, char **argv) {
    static double took[KINDS * ROUNDS_MAX];
    pthread_t threads[WRITERS];
    int rounds = argc == 3 ? atoi(argv[2]) : 0, catalog;
    char path[4096];
    if (rounds < 1 || rounds > ROUNDS_MAX)
        return 2;
    open_volume(argv[1]);
    snprintf(path, sizeof path, "%s/commit", argv[1]);
    must(catalog = open(path, O_RDWR | O_CREAT, 0600), "open");
    for (int w = 0; w < WRITERS; w++)
        pthread_create(&threads[w], NULL, writer, pauses[w]);
    for (int i = 0; i < KINDS * rounds; i++) {
        usleep(GAP_US);
        double start = now_us();
        atomic_store(&window, 2 * i + 1);
        do_one(i % KINDS, argv[1], catalog, i % KINDS ? took[i - i % KINDS] : 0);
        atomic_store(&window, 2 * i + 2);
        took[i] = now_us() - start;
    }
    atomic_store(&stop, 1);
    for (int w = 0; w < WRITERS; w++)
        pthread_join(threads[w], NULL);
    for (int i = 0; i < KINDS * rounds; i++)
        report(i, took[i]);
    onion_volume_close(volume);
    onion_volume_free(volume);
    return 0;
}
