/* pending.c: the list of changes that no frame holds yet: a record is added to it, and the last one taken back. See
 * volume.h for what must hold, journal.h for where the list lies. */
#include "base/sigbus.h"
#include "volume/internal.h"

/* Joins the record to the last one where it continues it, which is what sequential writes do. */
static int joined(struct onion_pending *pending, const struct onion_record *record) {
    if (pending->record_count == pending->join_from)
        return 0;
    struct onion_record *last = &pending->records[pending->record_count - 1];
    int goes_on = last->kind == record->kind && last->segment == record->segment &&
                  last->block_index + last->block_count == record->block_index &&
                  (record->kind != ONION_RECORD_DATA || last->slot + last->block_count == record->slot) &&
                  (uint64_t)last->block_count + record->block_count < UINT32_MAX;
    if (goes_on)
        last->block_count += record->block_count;
    return goes_on;
}

struct put {
    struct onion_volume *volume;
    const struct onion_record *record;
};

/* A process that is killed here leaves the list as it was before, or with the whole record. */
static int put_record(void *context) {
    const struct put *put = context;
    struct onion_pending *pending = &put->volume->pending;
    size_t count = pending->record_count;
    onion_fault_watch(pending->records + (count ? count - 1 : 0), 3 * sizeof *put->record);
    if (joined(pending, put->record)) {
        onion_fault_unwatch();
        return 0;
    }
    int declares = put->record->kind == ONION_RECORD_DATA && put->record->segment != pending->declared;
    if (declares)
        pending->records[count++] =
            onion_record_segment(put->record->segment, put->volume->segments[put->record->segment]->uuid);
    pending->records[count++] = *put->record;
    if (pending->published && !pending->is_held) {
        onion_fault_watch(pending->published, sizeof *pending->published);
        __atomic_store_n(pending->published, count, __ATOMIC_RELEASE);
    }
    onion_fault_unwatch();
    if (declares)
        pending->declared = put->record->segment;
    pending->record_count = count;
    return 0;
}

int onion_pending_put(struct onion_volume *volume, const struct onion_record *record) {
    struct put put = {volume, record};
    int status = onion_fault_run(put_record, &put);
    return __builtin_expect(status < 0, 0) ? onion_journal_note_fault(volume, status) : status;
}

struct onion_pending_mark onion_pending_mark(const struct onion_pending *pending) {
    size_t count = pending->record_count;
    return (struct onion_pending_mark){count, count ? pending->records[count - 1].block_count : 0, pending->declared};
}

/* Takes the last record back, which the index could not take. */
void onion_pending_take_back(struct onion_pending *pending, const struct onion_pending_mark *mark) {
    pending->record_count = mark->record_count;
    pending->declared = mark->declared;
    if (pending->published && !pending->is_held)
        __atomic_store_n(pending->published, mark->record_count, __ATOMIC_RELEASE);
    if (mark->record_count)
        pending->records[mark->record_count - 1].block_count = mark->last_blocks;
}
