/* check_wipe.c: bulk/wipe.c alone, without Python, for the sanitizers: random ranges against a reference in memory, a
 * cancel from another thread, refusals. Exits 0 if all holds.
 *
 * tools/check_kernels.sh builds and runs it, with either set of sanitizers. The files are made in $TMPDIR or /tmp. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bulk/wipe.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { FILE_BYTES = 3000 * 1024 + 123, RANGES_MAX = 40, LONG_BYTES = 96 << 20 };

static int temporary_file(void) {
    const char *directory = getenv("TMPDIR");
    int fd = open(directory ? directory : "/tmp", O_RDWR | O_TMPFILE, 0600);

    CHECK(fd >= 0);
    return fd;
}

static void check_random_ranges(int flags, int threads) {
    static unsigned char expected[FILE_BYTES], got[FILE_BYTES];
    struct onion_byte_range ranges[RANGES_MAX];
    struct onion_wipe_result result;
    uint64_t position = 0, total = 0, progress = 0;
    int fd = temporary_file();

    memset(expected, 0xAA, FILE_BYTES);
    CHECK(pwrite(fd, expected, FILE_BYTES, 0) == FILE_BYTES);
    for (size_t i = 0; i < RANGES_MAX; i++) {
        position += rand() % 3 ? (uint64_t)rand() % 60000 : 0;
        ranges[i] = (struct onion_byte_range){.offset = position, .length = (uint64_t)rand() % 120000};
        for (uint64_t at = position; at < position + ranges[i].length && at < FILE_BYTES; at++, total++)
            expected[at] = 0;
        position += ranges[i].length;
    }
    CHECK(onion_wipe(fd, ranges, RANGES_MAX, flags, threads, &result, &progress, NULL) == 0);
    CHECK(progress == total);
    CHECK(result.bytes_wiped == (flags & ONION_WIPE_ZERO ? total : 0));
    CHECK(result.bytes_verified == (flags & ONION_WIPE_VERIFY ? total : 0));
    CHECK(pread(fd, got, FILE_BYTES, 0) == FILE_BYTES);
    CHECK(memcmp(got, expected, FILE_BYTES) == 0);
    close(fd);
}

struct watched {
    uint64_t progress;
    int cancel;
};

static void *cancel_after_the_first_bytes(void *argument) {
    struct watched *watched = argument;

    while (__atomic_load_n(&watched->progress, __ATOMIC_RELAXED) == 0)
        ;
    __atomic_store_n(&watched->cancel, 1, __ATOMIC_RELAXED);
    return NULL;
}

/* The cancel may come too late, but then all is done; it never leaves something punched that was not synced. */
static void check_cancel(void) {
    struct onion_byte_range range = {.length = LONG_BYTES};
    struct onion_wipe_result result;
    struct watched watched = {0};
    pthread_t canceller;
    struct stat file;
    int status, fd = temporary_file();

    CHECK(fallocate(fd, 0, 0, LONG_BYTES) == 0);
    CHECK(pthread_create(&canceller, NULL, cancel_after_the_first_bytes, &watched) == 0);
    status =
        onion_wipe(fd, &range, 1, ONION_WIPE_ZERO | ONION_WIPE_PUNCH, 2, &result, &watched.progress, &watched.cancel);
    pthread_join(canceller, NULL);
    CHECK(status == 0 || status == ONION_E_CANCELLED);
    CHECK(fstat(fd, &file) == 0);
    if (status == ONION_E_CANCELLED && result.bytes_wiped == 0)
        CHECK(result.bytes_punched == 0 && file.st_blocks * 512 >= LONG_BYTES);
    close(fd);
}

static void check_refusals(void) {
    struct onion_byte_range overlapping[] = {{.offset = 0, .length = 2}, {.offset = 1, .length = 1}};
    struct onion_byte_range too_long = {.offset = 1, .length = UINT64_MAX};
    struct onion_wipe_result result;
    int fd = temporary_file(), read_only = open("/proc/self/exe", O_RDONLY), device = open("/dev/null", O_RDWR);

    CHECK(onion_wipe(fd, NULL, 0, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == 0);
    CHECK(onion_wipe(fd, overlapping, 2, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == -EINVAL);
    CHECK(onion_wipe(fd, &too_long, 1, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == -EINVAL);
    CHECK(onion_wipe(fd, overlapping, 1, ONION_WIPE_ZERO, 0, &result, NULL, NULL) == -EINVAL);
    CHECK(onion_wipe(device, overlapping, 1, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == -EINVAL);
    CHECK(onion_wipe(read_only, overlapping, 1, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == -EBADF);
    CHECK(onion_wipe(-1, overlapping, 1, ONION_WIPE_ZERO, 1, &result, NULL, NULL) == -EBADF);
    close(fd);
    close(read_only);
    close(device);
}

int main(void) {
    static const int all_that_make_zeros[] = {ONION_WIPE_ZERO, ONION_WIPE_ZERO | ONION_WIPE_VERIFY, ONION_WIPE_PUNCH,
                                              ONION_WIPE_ZERO | ONION_WIPE_PUNCH,
                                              ONION_WIPE_ZERO | ONION_WIPE_VERIFY | ONION_WIPE_PUNCH};

    srand(1);
    for (int i = 0; i < 20; i++)
        check_random_ranges(all_that_make_zeros[i % 5], 1 + i / 5);
    check_cancel();
    check_refusals();
    return 0;
}
