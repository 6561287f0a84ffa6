/* epoch.h: tells when every read that began before now has ended, without a lock on the read path.
 *
 * A reader enters, reads and leaves. This costs two atomic increments on a cache line that few threads share. A
 * writer retires an object that it took out of the readers' sight (a leaf of the block map, a mapping). The
 * object's free function runs once no reader that might have seen the object is left.
 *
 * Why this is right: a reader counts itself under the parity of the epoch that it saw, and then checks that the
 * epoch has not moved. So while epoch e lasts, only readers of e and of e-1 can be inside. The epoch moves from e
 * to e+1 only when the counters of parity e-1 are all zero. Readers of e-1 and e can hold an object that was
 * retired in e. The object is freed in e+2, when neither is left. Counters are sequentially consistent: a reader
 * that validated epoch e has made its count visible before. */
#ifndef ONIONSKIN_BASE_EPOCH_H
#define ONIONSKIN_BASE_EPOCH_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define ONION_EPOCH_LANES 32

typedef void (*onion_free_fn)(void *context, void *object);

struct onion_retired {
    onion_free_fn release;
    void *context;
    void *object;
};

struct onion_limbo {
    struct onion_retired *items;
    size_t count, capacity;
};

struct onion_epoch {
    uint64_t now;
    struct {
        uint64_t readers[2];
        char pad[48];
    } __attribute__((aligned(64))) lanes[ONION_EPOCH_LANES];
    pthread_mutex_t lock; /* guards limbo and moves of `now` */
    struct onion_limbo limbo[3];
    size_t retired_count; /* in all three, for deciding when to collect */
};

struct onion_ticket {
    uint32_t lane;
    uint32_t parity;
};

int onion_epoch_init(struct onion_epoch *epoch);
/* Frees all retired objects. No reader may be inside. */
void onion_epoch_destroy(struct onion_epoch *epoch);
struct onion_ticket onion_epoch_enter(struct onion_epoch *epoch);
void onion_epoch_leave(struct onion_epoch *epoch, struct onion_ticket ticket);
/* Runs release(context, object) once it is safe. A reader may call it. If memory for the list is missing, the
 * object is left allocated: a leak is better than a reader's crash. */
void onion_epoch_retire(struct onion_epoch *epoch, onion_free_fn release, void *context, void *object);
/* Waits until every reader that is inside now has left, and frees the objects that were retired before. Readers
 * must not call it. */
void onion_epoch_wait(struct onion_epoch *epoch);

#endif
