/* counter.c: what the guest of the tests does. Each tick it counts, dirties pages of its memory, writes the count to its
 * disk and to a second one, each with a sync, and then says it on its console, with a secret that is only in its memory.
 *
 *     counter MEBIBYTES PAGES_PER_SECOND TICK_MILLISECONDS FILE [SECOND_DISK]
 *
 * It looks at its own memory too: "memory is wrong" is a page that does not hold what was written there. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SECTOR = 512, RECENT = 64 };

static uint64_t seed = 88172645463325252u;

static uint64_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static uint64_t *memory;
static uint64_t pages;
static struct {
    uint64_t page, count;
} recent[RECENT];

/* Writes the count to some pages, after a look at some that were written before. */
static int dirty(uint64_t count, uint64_t number)
{
    int wrong = 0;
    for (uint64_t i = 0; i < number && pages; i++) {
        uint64_t page = draw() % pages, slot = i % RECENT;
        wrong |= recent[slot].count && memory[recent[slot].page * (PAGE / 8)] < recent[slot].count;
        memory[page * (PAGE / 8)] = count;
        recent[slot].page = page;
        recent[slot].count = count;
    }
    return wrong;
}

static int write_sector(int disk, uint64_t count)
{
    static char *sector;
    if (!sector && posix_memalign((void **)&sector, PAGE, SECTOR))
        return -1;
    memset(sector, 0, SECTOR);
    snprintf(sector, SECTOR, "%014lu\n", count);
    return pwrite(disk, sector, SECTOR, 0) != SECTOR || fdatasync(disk);
}

static int append(int file, uint64_t count)
{
    char line[16];
    snprintf(line, sizeof line, "%014lu\n", count);
    return pwrite(file, line, 15, (off_t)(count - 1) * 15) != 15 || fdatasync(file);
}

int main(int arguments, char **values)
{
    if (arguments < 5)
        return 2;
    uint64_t rate = strtoull(values[2], NULL, 10), tick = strtoull(values[3], NULL, 10), secret, count = 0;
    pages = strtoull(values[1], NULL, 10) << 8;
    memory = mmap(NULL, pages * PAGE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (uint64_t i = 0; i < pages * (PAGE / 8); i++)
        memory[i] = draw() | 1ull << 63;
    for (uint64_t i = 0; i < pages; i++)
        memory[i * (PAGE / 8)] = 0;
    int file = open(values[4], O_RDWR | O_CREAT | O_TRUNC, 0644);
    int disk = arguments > 5 ? open(values[5], O_RDWR) : -1;
    if (getrandom(&secret, sizeof secret, GRND_NONBLOCK) != sizeof secret)
        secret = 0;
    for (double due = seconds();;) {
        uint32_t random = 0;
        count++;
        if (dirty(count, rate * tick / 1000))
            printf("memory is wrong\n");
        if (append(file, count) || (disk >= 0 && write_sector(disk, count)))
            printf("a disk failed\n");
        if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
            random = 0;
        printf("tick %lu secret %016lx random %08x\n", count, secret, random);
        fflush(stdout);
        due += (double)tick / 1000;
        double now = seconds();
        if (due > now)
            usleep((useconds_t)((due - now) * 1e6));
        else
            due = now;
    }
}
