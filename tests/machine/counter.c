/* counter.c: what the guest of the tests does. Each tick it counts, dirties pages of its memory, writes the count to its
 * disk and to a second one, each with a sync, and then says it on its console, with a secret that is only in its memory.
 *
 *     counter MEBIBYTES PAGES_PER_SECOND TICK_MILLISECONDS FILE [SECOND_DISK]
 *
 * It looks at its own memory too: "memory is wrong" is a page that does not hold what was written there. Behind the answers
 * of both disks it writes the count to a page that begins with a mark (STAMP): so of one instant, the file is never behind
 * the disk, the disk never behind the stamp, and the stamp at most one behind the file. What it says goes to the screen too.
 * Once somebody types on its console, it waits no more between ticks, and says every 16th. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <termios.h>
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

/* Returns a page that is nowhere else in memory: the mark is made here. */
static volatile uint64_t *make_stamp(void)
{
    static const char mark[16] = "STAMP OF COUNTER";
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 16; i++)
        page[i] = (char)~mark[i];
    return (volatile uint64_t *)page + 2;
}

static int open_keys(void)
{
    struct termios how;
    int keys = open("/dev/ttyS0", O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (keys >= 0 && !tcgetattr(keys, &how)) {
        how.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        tcsetattr(keys, TCSANOW, &how);
    }
    return keys;
}

/* The text screen of VGA itself: a kernel that was started without a boot loader does not know that there is one. */
static volatile uint16_t *open_screen(void)
{
    int memory_of_machine = open("/dev/mem", O_RDWR);
    void *screen = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_of_machine, 0xb8000);
    return screen == MAP_FAILED ? NULL : screen;
}

static void show(volatile uint16_t *screen, uint64_t count)
{
    for (int digit = 9; screen && digit >= 0; digit--, count /= 10)
        screen[80 + digit] = (uint16_t)(0x700 | ('0' + count % 10));
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
    volatile uint64_t *stamp = make_stamp();
    int keys = open_keys(), is_fast = 0;
    volatile uint16_t *screen = open_screen();
    for (double due = seconds();;) {
        uint32_t random = 0;
        char key;
        is_fast |= read(keys, &key, 1) == 1;
        count++;
        if (dirty(count, rate * tick / 1000))
            printf("memory is wrong\n");
        if (append(file, count) || (disk >= 0 && write_sector(disk, count)))
            printf("a disk failed\n");
        *stamp = count;
        if (is_fast && count % 16)
            continue;
        show(screen, count);
        if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
            random = 0;
        printf("tick %lu secret %016lx random %08x\n", count, secret, random);
        fflush(stdout);
        tcdrain(STDOUT_FILENO); /* so that what is said is never behind what is done */
        if (is_fast)
            continue;
        due += (double)tick / 1000;
        double now = seconds();
        if (due > now)
            usleep((useconds_t)((due - now) * 1e6));
        else
            due = now;
    }
}
