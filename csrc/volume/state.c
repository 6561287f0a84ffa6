/* state.c: the state of a volume (poisoned, closed, forked), the flush gate, and the freezing of writers. See volume.h
 * for what must hold.
 *
 * The files that open, read, write and flush all use it. It calls none of them but the journal, in which it records a
 * failed sync. */
#include <errno.h>

#include "volume/internal.h"

/* ---- state ---- */

uint64_t onion_volume_size(const struct onion_volume *volume) {
    return __atomic_load_n(&volume->size_bytes, __ATOMIC_ACQUIRE);
}

uint32_t onion_volume_block_size(const struct onion_volume *volume) { return volume->block_size; }

int onion_volume_poisoned(const struct onion_volume *volume) {
    return __atomic_load_n(&volume->poisoned, __ATOMIC_SEQ_CST);
}

int onion_volume_closed(const struct onion_volume *volume) {
    return __atomic_load_n(&volume->closed, __ATOMIC_SEQ_CST);
}

void onion_volume_poison(struct onion_volume *volume) {
    if (onion_volume_usable(volume) == ONION_E_FORKED)
        return;
    pthread_mutex_lock(&volume->flush_lock);
    onion_volume_mark_poisoned(volume);
    pthread_cond_broadcast(&volume->flush_free);
    pthread_mutex_unlock(&volume->flush_lock);
}

void onion_volume_supersede(struct onion_volume *volume) { volume->superseded = 1; }

void onion_volume_drop_stale(struct onion_volume *volume) { onion_journal_drop_stale(volume); }

void onion_volume_after_fork(struct onion_volume *volume) { __atomic_store_n(&volume->forked, 1, __ATOMIC_SEQ_CST); }

/* ---- the flush gate ---- */

/* Closes the gate, or returns the code that says why it cannot. If the outcome of a commit is unknown, the thread that
 * keeps the gate closed may never come back to open it. So no thread waits at the gate of a volume that can no longer
 * be used. -EBUSY: the gate is closed, and `waits` is 0. */
static int flush_gate_close(struct onion_volume *volume, int waits) {
    int status = onion_volume_usable(volume);
    if (status < 0) /* in the child of a fork the lock may be held for ever */
        return status;
    pthread_mutex_lock(&volume->flush_lock);
    while ((status = onion_volume_usable(volume)) == 0 && volume->flush_busy && waits)
        pthread_cond_wait(&volume->flush_free, &volume->flush_lock);
    if (status == 0 && volume->flush_busy)
        status = -EBUSY;
    if (status == 0)
        volume->flush_busy = 1;
    pthread_mutex_unlock(&volume->flush_lock);
    return status;
}

/* Keeps the gate closed until the outcome is known. onion_volume_close need not wait for that. */
void onion_volume_keep_flush_gate(struct onion_volume *volume, int *sealing_or_rewriting, int kind) {
    pthread_mutex_lock(&volume->flush_lock);
    *sealing_or_rewriting = kind;
    pthread_cond_broadcast(&volume->flush_free);
    pthread_mutex_unlock(&volume->flush_lock);
}

void onion_volume_open_flush_gate(struct onion_volume *volume) {
    pthread_mutex_lock(&volume->flush_lock);
    volume->sealing = volume->rewriting = 0;
    volume->flush_busy = 0;
    pthread_cond_broadcast(&volume->flush_free);
    pthread_mutex_unlock(&volume->flush_lock);
}

static int close_gate_of_head(struct onion_volume *volume, int waits) {
    int status = flush_gate_close(volume, waits);
    if (status == 0 && !volume->own) { /* the volume is a view, or its head was not opened */
        onion_volume_open_flush_gate(volume);
        status = ONION_E_READ_ONLY;
    }
    return status;
}

int onion_volume_close_flush_gate(struct onion_volume *volume) { return close_gate_of_head(volume, 1); }

int onion_volume_try_flush_gate(struct onion_volume *volume) { return close_gate_of_head(volume, 0); }

/* ---- failed syncs ---- */

int onion_volume_poison_on(struct onion_volume *volume, int status) {
    /* After a failed sync the kernel may have dropped the pages and forgotten the error (Rebello et al., "Can
     * applications recover from fsync failures?", USENIX ATC 2020). So a second sync that succeeds proves nothing. The
     * journal records the failure for the next opening, before anybody is told. */
    if (status < 0) {
        onion_volume_mark_poisoned(volume);
        onion_journal_mark_poisoned(volume);
    }
    return status;
}

int onion_volume_sync_segment_names(struct onion_volume *volume) {
    int status = onion_sync_directory(volume->segments_directory); /* BARRIER: segment name */
    return onion_volume_poison_on(volume, onion_site_set(status, volume->segments_directory, 0));
}

/* ---- holding writers ---- */

int onion_volume_freeze(struct onion_volume *volume, uint64_t frames) {
    int status = onion_volume_close_flush_gate(volume); /* so that no flush under way waits for the gate below */
    if (status < 0)
        return status;
    /* A preparation waits for the gate with this lock held, and the close of a frozen volume would wait for that. */
    pthread_mutex_lock(&volume->prepare_lock);
    pthread_rwlock_wrlock(&volume->gate);
    pthread_mutex_lock(&volume->dirty_lock);
    int is_changed = volume->dirty_records.record_count || volume->log.cursor.sequence != frames;
    pthread_mutex_unlock(&volume->dirty_lock);
    if (is_changed) {
        pthread_rwlock_unlock(&volume->gate);
        pthread_mutex_unlock(&volume->prepare_lock);
        onion_volume_open_flush_gate(volume);
        return -EBUSY;
    }
    onion_volume_keep_flush_gate(volume, &volume->frozen, 1);
    return 0;
}

void onion_volume_thaw(struct onion_volume *volume) {
    if (!volume->frozen || onion_volume_closed(volume))
        return;
    volume->frozen = 0;
    pthread_rwlock_unlock(&volume->gate);
    pthread_mutex_unlock(&volume->prepare_lock);
    onion_volume_open_flush_gate(volume);
}
