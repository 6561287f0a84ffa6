/* check_copy.c: bulk/copy.c alone, without Python, for the sanitizers: random extents against a reference in memory,
 * holes, a rate, a cancel from another thread, a source that ends early. Exits 0 if all holds.
 *
 * tools/check_kernels.sh builds and runs it, with either set of sanitizers. The files are made in $TMPDIR or /tmp. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bulk/copy.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

enum { FILE_BYTES = 600 * 1024, EXTENTS_MAX = 64 };

/* In the place of libc's: how often somebody looked for the end of data. */
static int looks_for_ends;

off_t lseek(int fd, off_t offset, int whence) {
    if (whence == SEEK_HOLE)
        __atomic_fetch_add(&looks_for_ends, 1, __ATOMIC_RELAXED);
    return syscall(SYS_lseek, fd, offset, whence);
}

static int temporary_file(void) {
    const char *directory = getenv("TMPDIR");
    int fd = open(directory ? directory : "/tmp", O_RDWR | O_TMPFILE, 0600);

    CHECK(fd >= 0);
    return fd;
}

static void fill(int fd, unsigned char *contents, int with_holes) {
    CHECK(ftruncate(fd, FILE_BYTES) == 0);
    for (size_t i = 0; i < FILE_BYTES; i++)
        contents[i] = with_holes && i / 32768 % 2 ? 0 : (unsigned char)(1 + rand() % 255);
    for (size_t i = 0; i < FILE_BYTES; i += 32768)
        if (!with_holes || i / 32768 % 2 == 0)
            CHECK(pwrite(fd, contents + i, FILE_BYTES - i < 32768 ? FILE_BYTES - i : 32768, (off_t)i) > 0);
}

/* Extents one behind the other on the destination side, in random order, some of them joinable. */
static size_t random_extents(struct onion_copy_extent *extents, const int *sources, int destination) {
    size_t count = 0;

    for (uint64_t position = 0; count < EXTENTS_MAX;) {
        struct onion_copy_extent extent = {.destination = destination};
        int choice = rand() % 4;

        position += rand() % 3 ? 0 : (uint64_t)rand() % 5000;
        extent.length = 1 + (uint64_t)rand() % 20000;
        if (position + extent.length > FILE_BYTES)
            break;
        extent.source = choice < 2 ? sources[choice] : -1;
        extent.source_offset = choice < 2 ? (uint64_t)rand() % (FILE_BYTES - extent.length) : 0;
        if (choice == 3 && count > 0 &&
            extents[count - 1].source_offset + extents[count - 1].length + extent.length <= FILE_BYTES) {
            extent.source = extents[count - 1].source;
            extent.source_offset = extents[count - 1].source_offset + extents[count - 1].length;
            position = extents[count - 1].destination_offset + extents[count - 1].length;
        }
        extent.destination_offset = position;
        position += extent.length;
        extents[count++] = extent;
    }
    return count;
}

static void shuffle(struct onion_copy_extent *extents, size_t count) {
    for (size_t i = count; i > 1; i--) {
        size_t j = (size_t)rand() % i;
        struct onion_copy_extent swapped = extents[i - 1];
        extents[i - 1] = extents[j];
        extents[j] = swapped;
    }
}

static void check_random_extents(int with_holes, int flags, int threads) {
    static unsigned char contents[2][FILE_BYTES], expected[FILE_BYTES], got[FILE_BYTES];
    struct onion_copy_extent extents[EXTENTS_MAX];
    struct onion_copy_progress progress = {0};
    int sources[2] = {temporary_file(), temporary_file()}, destination = temporary_file();
    uint64_t total = 0;
    size_t count;

    fill(sources[0], contents[0], with_holes);
    fill(sources[1], contents[1], with_holes);
    fill(destination, expected, 0);
    count = random_extents(extents, sources, destination);
    for (size_t i = 0; i < count; i++) {
        unsigned char *to = expected + extents[i].destination_offset;
        total += extents[i].length;
        if (extents[i].source < 0)
            memset(to, 0, extents[i].length);
        else
            memcpy(to, contents[extents[i].source == sources[1]] + extents[i].source_offset, extents[i].length);
    }
    shuffle(extents, count);
    CHECK(onion_copy(extents, count, threads, flags, &progress) == 0);
    CHECK(progress.bytes_done == total);
    CHECK(progress.bytes_reflinked + progress.bytes_ranged + progress.bytes_copied + progress.bytes_zeroed == total);
    CHECK(pread(destination, got, FILE_BYTES, 0) == FILE_BYTES);
    CHECK(memcmp(got, expected, FILE_BYTES) == 0);
    close(sources[0]);
    close(sources[1]);
    close(destination);
}

/* A look for the end of data takes longer the farther that is: on tmpfs it goes through all pages up to there. */
static void check_that_the_end_of_data_is_looked_for_once(void) {
    static unsigned char contents[FILE_BYTES], got[FILE_BYTES];
    struct onion_copy_extent extents[EXTENTS_MAX];
    struct onion_copy_progress progress = {0};
    int source = temporary_file(), destination = temporary_file();

    fill(source, contents, 0);
    for (size_t i = 0; i < EXTENTS_MAX; i++)
        extents[i] = (struct onion_copy_extent){source, destination, (i * 37) % EXTENTS_MAX * 4096, i * 4096, 4096};
    looks_for_ends = 0;
    CHECK(onion_copy(extents, EXTENTS_MAX, 1, ONION_COPY_ZERO_HOLES, &progress) == 0);
    CHECK(looks_for_ends == 1);
    CHECK(pread(destination, got, EXTENTS_MAX * 4096, 0) == EXTENTS_MAX * 4096);
    for (size_t i = 0; i < EXTENTS_MAX; i++)
        CHECK(memcmp(got + i * 4096, contents + (i * 37) % EXTENTS_MAX * 4096, 4096) == 0);
    for (size_t i = 0; i < EXTENTS_MAX; i++)
        extents[i].source = -1;
    CHECK(onion_copy(extents, EXTENTS_MAX, 1, ONION_COPY_ZERO_HOLES, &progress) == 0);
    CHECK(looks_for_ends == 1); /* whether there is something to punch is told by where data begins */
    close(source);
    close(destination);
}

static void *cancel_after_the_first_bytes(void *argument) {
    struct onion_copy_progress *progress = argument;

    while (__atomic_load_n(&progress->bytes_done, __ATOMIC_RELAXED) == 0)
        ;
    __atomic_store_n(&progress->cancel, 1, __ATOMIC_RELAXED);
    return NULL;
}

static void check_cancel(void) {
    struct onion_copy_progress progress = {.bytes_per_second = 1000};
    struct onion_copy_extent extent = {.source = -1, .destination = temporary_file(), .length = 64 << 20};
    pthread_t canceller;

    CHECK(pthread_create(&canceller, NULL, cancel_after_the_first_bytes, &progress) == 0);
    CHECK(onion_copy(&extent, 1, 3, 0, &progress) == ONION_E_CANCELLED);
    pthread_join(canceller, NULL);
    CHECK(progress.bytes_done > 0 && progress.bytes_done < extent.length);
    close(extent.destination);
}

static void check_refusals(void) {
    struct onion_copy_progress progress = {0};
    struct onion_copy_extent extent = {.source = temporary_file(), .destination = temporary_file(), .length = 1};

    CHECK(onion_copy(NULL, 0, 1, 0, &progress) == 0);
    CHECK(onion_copy(&extent, 1, 0, 0, &progress) == -EINVAL);
    CHECK(onion_copy(&extent, 1, 65, 0, &progress) == -EINVAL);
    CHECK(onion_copy(&extent, 1, 1, 0, &progress) == -EIO); /* the source is empty */
    extent.length = UINT64_MAX;
    CHECK(onion_copy(&extent, 1, 1, 0, &progress) == -EINVAL);
    close(extent.source);
    close(extent.destination);
}

int main(void) {
    srand(1);
    for (int i = 0; i < 48; i++)
        check_random_extents(i % 2, i / 2 % 4, 1 + i / 8 % 4);
    check_that_the_end_of_data_is_looked_for_once();
    check_cancel();
    check_refusals();
    return 0;
}
