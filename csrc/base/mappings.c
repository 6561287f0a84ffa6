/* mappings.c: see mappings.h. */
#define _GNU_SOURCE
#include "base/mappings.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/status.h"

#define COUNT_MAX_DEFAULT 65530u

static uint64_t taken, most;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_limit(void) {
    char text[32] = "";
    uint64_t count = COUNT_MAX_DEFAULT;
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t length = read(fd, text, sizeof text - 1);
        if (length > 0 && strtoull(text, NULL, 10))
            count = strtoull(text, NULL, 10);
        close(fd);
    }
    most = count - count / 8;
}

int onion_mappings_take(uint64_t count) {
    pthread_once(&once, read_limit);
    if (__atomic_add_fetch(&taken, count, __ATOMIC_SEQ_CST) <= most)
        return 0;
    onion_mappings_give_back(count);
    return ONION_E_MAPPINGS;
}

void onion_mappings_give_back(uint64_t count) { __atomic_sub_fetch(&taken, count, __ATOMIC_SEQ_CST); }
