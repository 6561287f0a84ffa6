/* The longest write beside what the file system has to do for a group snapshot, by a plain program: the floor below
 * which nobody gets on the same disk.
 *
 *     plain_group DIRECTORY DISKS WRITES_PER_SECOND
 *
 * For each disk a client sends 4 KiB through a socket at random times, as fio does, and a server appends them to the
 * disk's file and a record to a mapped one, as the engine does. Each line that is read is one snapshot: all servers are
 * held while each disk gets its next file; then the files before are synced side by side, each with a record in another
 * file, and a catalog has one commit. "done" is printed, and two files for each disk are made durable for the next
 * one. At the end of the input each write is printed: when it began, and seconds that it took. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/turns.h"

enum {
    BLOCK = 4096,
    HEADER = 4096,
    DISKS_MAX = 64,
    WRITES_MAX = 200000,
    RECORD = 24,
    RECORDS = 1 << 16,
    COMMIT = 65536
};

struct files {
    int data, map;
    off_t end;
};

struct disk {
    pthread_rwlock_t gate;
    struct files now, before, next;
    int client, server, number;
    char *records;
    struct {
        double begun, took;
    } writes[WRITES_MAX];
    int count;
};

static struct disk *disks[DISKS_MAX];
static int disk_count, catalog, made;
static double rate;
static const char *directory;
static atomic_int stop, taken;

static void must(int holds, const char *what) {
    if (!holds) {
        perror(what);
        exit(1);
    }
}

static double now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int make(const char *kind) {
    char path[4096], header[HEADER] = {1};
    snprintf(path, sizeof path, "%s/%d.%s", directory, made++, kind);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    must(fd >= 0 && pwrite(fd, header, sizeof header, 0) == HEADER, path);
    return fd;
}

static void make_next(void) {
    int folder = open(directory, O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < disk_count; i++) {
        struct files *next = &disks[i]->next;
        *next = (struct files){make("data"), make("map"), HEADER};
        must(fdatasync(next->data) == 0 && fdatasync(next->map) == 0 && fsync(folder) == 0, "sync");
    }
    close(folder);
}

static void *serve(void *argument) {
    struct disk *disk = argument;
    char block[BLOCK];
    while (recv(disk->server, block, sizeof block, MSG_WAITALL) == BLOCK) {
        pthread_rwlock_rdlock(&disk->gate);
        must(pwrite(disk->now.data, block, sizeof block, disk->now.end) == BLOCK, "pwrite");
        disk->now.end += BLOCK;
        memset(disk->records + (size_t)RECORD * (disk->count % RECORDS), disk->count, RECORD);
        pthread_rwlock_unlock(&disk->gate);
        must(send(disk->server, block, 1, 0) == 1, "send");
    }
    return NULL;
}

static void *write_on(void *argument) {
    struct disk *disk = argument;
    char block[BLOCK] = {7};
    unsigned seed = (unsigned)disk->number + 1;
    double at = now(CLOCK_MONOTONIC);
    while (!atomic_load(&stop) && disk->count < WRITES_MAX) {
        at -= log((rand_r(&seed) + 1.0) / (RAND_MAX + 2.0)) / rate;
        double wait = at - now(CLOCK_MONOTONIC);
        if (wait > 0)
            usleep((useconds_t)(wait * 1e6));
        double begun = now(CLOCK_REALTIME), start = now(CLOCK_MONOTONIC);
        must(send(disk->client, block, sizeof block, 0) == BLOCK && recv(disk->client, block, 1, 0) == 1, "client");
        disk->writes[disk->count].begun = begun;
        disk->writes[disk->count++].took = now(CLOCK_MONOTONIC) - start;
    }
    return NULL;
}

static void *sync_disks(void *argument) {
    char frame[BLOCK] = {3};
    int i;
    while ((i = atomic_fetch_add(&taken, 1)) < disk_count) {
        struct files *before = &disks[i]->before;
        must(fdatasync(before->data) == 0, "sync");
        must(pwrite(before->map, frame, sizeof frame, HEADER) == BLOCK && fdatasync(before->map) == 0, "map");
        must(close(before->data) == 0 && close(before->map) == 0, "close");
    }
    return argument;
}

static void snapshot(void) {
    static char commit[COMMIT];
    static off_t end;
    pthread_t threads[DISKS_MAX];
    for (int i = 0; i < disk_count; i++)
        pthread_rwlock_wrlock(&disks[i]->gate);
    for (int i = 0; i < disk_count; i++) {
        disks[i]->before = disks[i]->now;
        disks[i]->now = disks[i]->next;
    }
    for (int i = 0; i < disk_count; i++)
        pthread_rwlock_unlock(&disks[i]->gate);
    atomic_store(&taken, 0);
    for (int i = 1; i < disk_count; i++)
        must(pthread_create(&threads[i], NULL, sync_disks, NULL) == 0, "pthread_create");
    sync_disks(NULL);
    for (int i = 1; i < disk_count; i++)
        pthread_join(threads[i], NULL);
    end = (end + COMMIT) % (64 * COMMIT);
    must(pwrite(catalog, commit, sizeof commit, end) == COMMIT && fdatasync(catalog) == 0, "catalog");
}

static struct disk *start(int number, pthread_t *client) {
    struct disk *disk = calloc(1, sizeof *disk);
    pthread_t server;
    int ends[2], records = make("dirty");
    must(disk && socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    must(ftruncate(records, (off_t)RECORD * RECORDS) == 0, "ftruncate");
    disk->records = mmap(NULL, (size_t)RECORD * RECORDS, PROT_READ | PROT_WRITE, MAP_SHARED, records, 0);
    must(disk->records != MAP_FAILED, "mmap");
    disk->client = ends[0], disk->server = ends[1], disk->number = number;
    disk->now = (struct files){make("data"), make("map"), HEADER};
    pthread_rwlockattr_t writers_first;
    pthread_rwlockattr_init(&writers_first);
    pthread_rwlockattr_setkind_np(&writers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&disk->gate, &writers_first);
    must(pthread_create(&server, NULL, serve, disk) == 0, "pthread_create");
    must(pthread_create(client, NULL, write_on, disk) == 0, "pthread_create");
    return disk;
}

int main(int argc, char **argv) {
    pthread_t clients[DISKS_MAX];
    char line[16];
    if (argc != 4 || atoi(argv[2]) > DISKS_MAX)
        return 2;
    directory = argv[1], rate = atof(argv[3]);
    (void)onion_turns_take_short();
    catalog = make("catalog");
    for (int i = 0; i < atoi(argv[2]); i++, disk_count++)
        disks[i] = start(i, &clients[i]);
    make_next();
    while (puts("done"), fflush(stdout), fgets(line, sizeof line, stdin)) {
        snapshot();
        puts("taken"), fflush(stdout);
        make_next();
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < disk_count; i++) {
        pthread_join(clients[i], NULL);
        for (int k = 0; k < disks[i]->count; k++)
            printf("%.6f %.6f\n", disks[i]->writes[k].begun, disks[i]->writes[k].took);
    }
    return 0;
}
