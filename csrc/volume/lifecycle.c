/* lifecycle.c: makes an empty volume, closes a volume, and manages the memory of its index. See volume.h for what must
 * hold, and recovery.c for how files are opened. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/sigbus.h"
#include "base/sparse_table.h"
#include "volume/internal.h"

#define SEGMENTS_BYTES ((ONION_SEGMENT_LAST + 1) * sizeof(struct onion_segment *))

static void release_leaf(void *context, void *leaf) {
    (void)context;
    free(leaf);
}

void onion_volume_retire_leaf(void *context, void *leaf) {
    struct onion_volume *volume = context;
    onion_epoch_retire(&volume->epoch, release_leaf, NULL, leaf);
}

static void init_locks(struct onion_volume *volume) {
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
#ifdef __GLIBC__
    /* Otherwise a stream of writers would keep a snapshot waiting for ever. */
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    pthread_rwlock_init(&volume->gate, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    for (int i = 0; i < ONION_STRIPES; i++)
        pthread_mutex_init(&volume->stripes[i], NULL);
    pthread_mutex_init(&volume->slots_lock, NULL);
    pthread_mutex_init(&volume->dirty_lock, NULL);
    pthread_mutex_init(&volume->flush_lock, NULL);
    pthread_mutex_init(&volume->prepare_lock, NULL);
    pthread_cond_init(&volume->flush_free, NULL);
}

int onion_volume_new(uint32_t block_size, uint64_t size_bytes, const char *segments_directory,
                     const char *layers_directory, int wipe_zero, int writable, struct onion_volume **out) {
    uint32_t shift = (uint32_t)__builtin_ctz(block_size ? block_size : 1);
    if (block_size != 1u << shift || shift < ONION_BLOCK_SHIFT_MIN || shift > ONION_BLOCK_SHIFT_MAX ||
        size_bytes > ONION_VOLUME_BYTES_MAX)
        return -EINVAL;
    int status = onion_fault_install();
    if (status < 0)
        return status;
    struct onion_volume *volume;
    if (posix_memalign((void **)&volume, 64, sizeof *volume))
        return -ENOMEM;
    memset(volume, 0, sizeof *volume);
    volume->block_size = block_size;
    volume->block_shift = shift;
    volume->blocks_per_range = 1u << (ONION_RANGE_BYTES_SHIFT - shift);
    volume->size_bytes = size_bytes;
    volume->wipe_zero = wipe_zero;
    volume->writable = writable;
    volume->generation = 1;
    volume->log.fd = volume->next_log.fd = volume->prepared_log.fd = -1;
    volume->nothing_below = 1;
    volume->compact_map_at = 512u << 10;
    onion_journal_init(&volume->journal);
    init_locks(volume);
    onion_epoch_init(&volume->epoch);
    volume->segments_directory = strdup(segments_directory);
    volume->layers_directory = strdup(layers_directory);
    volume->segments = onion_sparse_table(SEGMENTS_BYTES);
    static const unsigned char no_id[ONION_UUID_BYTES];
    (void)onion_segment_new(&volume->store, "", no_id, 0, shift, &volume->vacant); /* NULL: no memory */
    /* The index covers whole ranges, and grows with the volume. */
    uint64_t ranges = (size_bytes + (1ull << ONION_RANGE_BYTES_SHIFT) - 1) >> ONION_RANGE_BYTES_SHIFT;
    status = onion_map_init(&volume->index, (ranges ? ranges : 1) << (ONION_RANGE_BYTES_SHIFT - shift), shift);
    if (status == 0)
        status = onion_build_init(&volume->build, &volume->index);
    if (status == 0)
        status = onion_store_note(&volume->store, segments_directory);
    if (status == 0 &&
        (!volume->segments_directory || !volume->layers_directory || !volume->segments || !volume->vacant))
        status = -ENOMEM;
    if (status < 0) {
        onion_volume_free(volume);
        return status;
    }
    *out = volume;
    return 0;
}

static void release_root(void *context, void *old) {
    (void)context;
    onion_old_root_free(old);
}

int onion_volume_grow_index(struct onion_volume *volume, uint64_t size_bytes) {
    struct onion_old_root *old;
    uint64_t blocks = (size_bytes >> volume->block_shift) + ((size_bytes & (volume->block_size - 1)) != 0);
    int status = onion_map_grow(&volume->index, blocks, &old);
    if (status == 0 && old)
        onion_epoch_retire(&volume->epoch, release_root, NULL, old);
    return status;
}

/* Frees what is read and written. All others have left, or find the volume closed. */
static void free_contents(struct onion_volume *volume) {
    onion_below_free(volume->below);
    volume->below = NULL;
    for (uint32_t i = 1; i <= volume->segment_count; i++) {
        if (volume->segments[i] != volume->vacant)
            onion_segment_free(volume->segments[i]);
        volume->segments[i] = NULL;
    }
    volume->segment_count = 0;
    onion_mappings_give_back(volume->mappings);
    volume->mappings = 0;
    onion_segment_free(volume->next_spare);
    volume->next_spare = NULL;
    if (volume->base)
        onion_base_release(NULL, volume->base);
    volume->base = NULL;
    onion_volume_release_batch(&volume->seal.batch); /* its records are in the journal, where that has a file */
    volume->seal.batch = (struct onion_dirty_records){0};
    onion_head_log_close(&volume->log);
    onion_head_log_close(&volume->next_log);
    onion_head_log_close(&volume->prepared_log);
    onion_journal_close(volume);
    volume->index.retire = NULL;
    onion_map_destroy(&volume->index);
    onion_build_destroy(&volume->build);
}

void onion_volume_close(struct onion_volume *volume) {
    if (__atomic_exchange_n(&volume->closed, 1, __ATOMIC_SEQ_CST) || volume->forked)
        return;
    /* Wait for a flush under way. A seal or rewrite that waits for its outcome will find the volume closed. */
    pthread_mutex_lock(&volume->flush_lock);
    while (volume->flush_busy && !volume->sealing && !volume->rewriting && !volume->frozen)
        pthread_cond_wait(&volume->flush_free, &volume->flush_lock);
    int gate_is_ours = !volume->flush_busy;
    volume->flush_busy = 1;
    pthread_mutex_unlock(&volume->flush_lock);
    if (!volume->frozen) { /* if it is frozen, this thread holds both */
        pthread_mutex_lock(&volume->prepare_lock);
        pthread_rwlock_wrlock(&volume->gate);
    }
    onion_epoch_wait(&volume->epoch);
    free_contents(volume);
    pthread_rwlock_unlock(&volume->gate);
    pthread_mutex_unlock(&volume->prepare_lock);
    pthread_mutex_lock(&volume->flush_lock);
    if (gate_is_ours)
        volume->flush_busy = 0;
    pthread_cond_broadcast(&volume->flush_free);
    pthread_mutex_unlock(&volume->flush_lock);
}

void onion_volume_free(struct onion_volume *volume) {
    if (!volume || volume->forked) /* in a child of fork() the locks may be in any state: leave the memory to exit */
        return;
    onion_volume_close(volume);
    onion_epoch_destroy(&volume->epoch);
    free(volume->dirty_records.records);
    free(volume->dirty_records.freed);
    free(volume->next_numbers);
    onion_segment_free(volume->vacant);
    onion_sparse_table_free(volume->segments, SEGMENTS_BYTES);
    onion_store_forget(&volume->store);
    free(volume->segments_directory);
    free(volume->layers_directory);
    free(volume);
}

uint64_t onion_volume_memory(const struct onion_volume *volume) {
    uint64_t ranges = (onion_volume_size(volume) >> ONION_RANGE_BYTES_SHIFT) + 1;
    return ranges * sizeof(uint64_t) + (uint64_t)__atomic_load_n(&volume->index.leaf_bytes, __ATOMIC_RELAXED);
}
