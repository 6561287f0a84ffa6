/* epoch.c: see epoch.h for the argument. */
#define _GNU_SOURCE
#include "base/epoch.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COLLECT_EVERY 64
#define YIELDS 100

static uint32_t next_lane;
static __thread uint32_t own_lane_plus_one;

int onion_epoch_init(struct onion_epoch *epoch) {
    memset(epoch, 0, sizeof *epoch);
    epoch->now = 2;
    return -pthread_mutex_init(&epoch->lock, NULL);
}

static void limbo_release(struct onion_epoch *epoch, struct onion_limbo *limbo) {
    for (size_t i = 0; i < limbo->count; i++)
        limbo->items[i].release(limbo->items[i].context, limbo->items[i].object);
    epoch->retired_count -= limbo->count;
    limbo->count = 0;
}

void onion_epoch_destroy(struct onion_epoch *epoch) {
    for (int i = 0; i < 3; i++) {
        limbo_release(epoch, &epoch->limbo[i]);
        free(epoch->limbo[i].items);
        epoch->limbo[i] = (struct onion_limbo){0};
    }
    pthread_mutex_destroy(&epoch->lock);
}

static uint32_t lane_of_this_thread(void) {
    if (!own_lane_plus_one)
        own_lane_plus_one = __atomic_fetch_add(&next_lane, 1, __ATOMIC_RELAXED) % ONION_EPOCH_LANES + 1;
    return own_lane_plus_one - 1;
}

struct onion_ticket onion_epoch_enter(struct onion_epoch *epoch) {
    struct onion_ticket ticket = {lane_of_this_thread(), 0};
    for (;;) {
        uint64_t seen = __atomic_load_n(&epoch->now, __ATOMIC_SEQ_CST);
        ticket.parity = seen & 1;
        __atomic_fetch_add(&epoch->lanes[ticket.lane].readers[ticket.parity], 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&epoch->now, __ATOMIC_SEQ_CST) == seen)
            return ticket;
        /* The epoch moved between the two loads: this count may stand under a parity that nobody waits for. */
        onion_epoch_leave(epoch, ticket);
    }
}

void onion_epoch_leave(struct onion_epoch *epoch, struct onion_ticket ticket) {
    __atomic_fetch_sub(&epoch->lanes[ticket.lane].readers[ticket.parity], 1, __ATOMIC_SEQ_CST);
}

static int parity_is_empty(const struct onion_epoch *epoch, unsigned parity) {
    for (int i = 0; i < ONION_EPOCH_LANES; i++)
        if (__atomic_load_n(&epoch->lanes[i].readers[parity], __ATOMIC_SEQ_CST))
            return 0;
    return 1;
}

/* Moves the epoch on if nobody of the one before is left. Called with the lock held. */
static int advance(struct onion_epoch *epoch) {
    uint64_t now = epoch->now;
    if (!parity_is_empty(epoch, (now + 1) & 1))
        return 0;
    __atomic_store_n(&epoch->now, now + 1, __ATOMIC_SEQ_CST);
    limbo_release(epoch, &epoch->limbo[(now + 2) % 3]); /* retired in now - 1 */
    return 1;
}

void onion_epoch_retire(struct onion_epoch *epoch, onion_free_fn release, void *context, void *object) {
    pthread_mutex_lock(&epoch->lock);
    struct onion_limbo *limbo = &epoch->limbo[epoch->now % 3];
    if (limbo->count == limbo->capacity) {
        size_t capacity = limbo->capacity ? limbo->capacity * 2 : 64;
        struct onion_retired *items = realloc(limbo->items, capacity * sizeof *items);
        if (!items) {
            pthread_mutex_unlock(&epoch->lock);
            return;
        }
        limbo->items = items;
        limbo->capacity = capacity;
    }
    limbo->items[limbo->count++] = (struct onion_retired){release, context, object};
    if (++epoch->retired_count % COLLECT_EVERY == 0)
        advance(epoch);
    pthread_mutex_unlock(&epoch->lock);
}

void onion_epoch_wait(struct onion_epoch *epoch) {
    const struct timespec nap = {.tv_nsec = 100000};
    unsigned tries = 0;
    pthread_mutex_lock(&epoch->lock);
    uint64_t goal = epoch->now + 2;
    while (epoch->now < goal) {
        if (advance(epoch))
            continue;
        /* Readers hold their place for the time of a copy; where one waits for a slow disk, so does this thread. */
        pthread_mutex_unlock(&epoch->lock);
        if (tries++ < YIELDS)
            sched_yield();
        else
            nanosleep(&nap, NULL);
        pthread_mutex_lock(&epoch->lock);
    }
    pthread_mutex_unlock(&epoch->lock);
}
