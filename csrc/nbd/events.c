/* events.c: events, the clock and counters, which all other files of the server use. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "nbd/internal.h"

/* ---- events ---- */

void onion_nbd_event(struct onion_nbd_server *server, const char *format, ...) {
    va_list arguments;
    uint64_t one = 1;
    va_start(arguments, format);
    pthread_mutex_lock(&server->event_lock);
    if (server->event_count == ONION_NBD_EVENTS_MAX) {
        server->event_head = (server->event_head + 1) % ONION_NBD_EVENTS_MAX;
        server->event_count--;
        server->events_dropped++;
    }
    int is_first = !server->event_count;
    uint32_t at = (server->event_head + server->event_count++) % ONION_NBD_EVENTS_MAX;
    vsnprintf(server->events[at], ONION_NBD_EVENT_BYTES, format, arguments);
    pthread_mutex_unlock(&server->event_lock);
    va_end(arguments);
    /* Behind another event that waits, the descriptor is readable already, or is about to become so. The write fails only
     * if the counter is full, and then it is readable too. */
    if (is_first && write(server->event_fd, &one, sizeof one) < 0)
        return;
}

int onion_nbd_event_fd(const struct onion_nbd_server *server) { return server->event_fd; }

uint32_t onion_nbd_next_event(struct onion_nbd_server *server, char out[ONION_NBD_EVENT_BYTES], uint64_t *dropped) {
    uint32_t length = 0;
    uint64_t count;
    pthread_mutex_lock(&server->event_lock);
    *dropped = server->events_dropped;
    server->events_dropped = 0;
    if (server->event_count) {
        memcpy(out, server->events[server->event_head], ONION_NBD_EVENT_BYTES);
        length = (uint32_t)strlen(out);
        server->event_head = (server->event_head + 1) % ONION_NBD_EVENTS_MAX;
        server->event_count--;
    }
    if (!server->event_count && read(server->event_fd, &count, sizeof count) < 0)
        count = 0;
    pthread_mutex_unlock(&server->event_lock);
    return length;
}

/* ---- words that a thread waits for ---- */

uint32_t onion_nbd_await(uint32_t *word, uint32_t than, const struct timespec *until) {
    uint32_t found;
    while ((found = __atomic_load_n(word, __ATOMIC_ACQUIRE)) == than)
        if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, than, until, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno == ETIMEDOUT)
            return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    return found;
}

void onion_nbd_say(uint32_t *word, uint32_t what) {
    __atomic_store_n(word, what, __ATOMIC_RELEASE);
    /* The thread may have read it and gone: whoever uses the address now looks at what it waits for, and waits on. */
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* ---- the clock, and counters ---- */

struct timespec onion_nbd_in_ms(uint64_t ms) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(ms / 1000);
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    return until;
}

void onion_nbd_init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

int64_t onion_nbd_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

void onion_nbd_add_counters(struct onion_nbd_counters *sum, const struct onion_nbd_counters *one) {
    for (int i = 0; i < ONION_NBD_VERBS; i++) {
        sum->requests[i] += __atomic_load_n(&one->requests[i], __ATOMIC_RELAXED);
        sum->bytes[i] += __atomic_load_n(&one->bytes[i], __ATOMIC_RELAXED);
        sum->latency_ns[i] += __atomic_load_n(&one->latency_ns[i], __ATOMIC_RELAXED);
    }
    sum->errors += __atomic_load_n(&one->errors, __ATOMIC_RELAXED);
    sum->sends += __atomic_load_n(&one->sends, __ATOMIC_RELAXED);
}
