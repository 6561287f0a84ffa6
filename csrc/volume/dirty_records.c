/* dirty_records.c: the list of changes that no frame holds yet: it adds a record, and takes the last one back. See
 * volume.h for what must hold, and journal.h for where the list lies. */
#include "base/sigbus.h"
#include "volume/internal.h"

int onion_dirty_records_note_fault(struct onion_volume *volume, int status) {
    const char *path = volume->journal.path;
    /* A full half is no fault of the file, because a flush makes room. An error in the heap concerns no file. */
    return path && status != ONION_E_JOURNAL_FULL ? onion_site_set(status, path, 0) : status;
}

/* Joins the record to the last one if it continues it, as sequential writes do. Returns whether it did. */
static int joined(struct onion_dirty_records *dirty, const struct onion_record *record) {
    if (dirty->record_count == dirty->join_from)
        return 0;
    struct onion_record *last = &dirty->records[dirty->record_count - 1];
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

/* Adds the record. If the process is killed here, the list is as it was before, or has the whole record. */
static int put_record(void *context) {
    const struct put *put = context;
    struct onion_dirty_records *dirty = &put->volume->dirty_records;
    size_t count = dirty->record_count;
    onion_fault_watch(dirty->records + (count ? count - 1 : 0), 3 * sizeof *put->record);
    if (joined(dirty, put->record)) {
        onion_fault_unwatch();
        return 0;
    }
    int declares = put->record->kind == ONION_RECORD_DATA && put->record->segment != dirty->declared;
    if (declares)
        dirty->records[count++] =
            onion_record_segment(put->record->segment, put->volume->segments[put->record->segment]->uuid);
    dirty->records[count++] = *put->record;
    if (dirty->published && !dirty->is_held) {
        onion_fault_watch(dirty->published, sizeof *dirty->published);
        __atomic_store_n(dirty->published, count, __ATOMIC_RELEASE);
    }
    onion_fault_unwatch();
    if (declares)
        dirty->declared = put->record->segment;
    dirty->record_count = count;
    return 0;
}

int onion_dirty_records_put(struct onion_volume *volume, const struct onion_record *record) {
    struct put put = {volume, record};
    int status = onion_fault_run(put_record, &put);
    return __builtin_expect(status < 0, 0) ? onion_dirty_records_note_fault(volume, status) : status;
}

struct onion_dirty_records_mark onion_dirty_records_mark(const struct onion_dirty_records *dirty) {
    size_t count = dirty->record_count;
    return (struct onion_dirty_records_mark){count, count ? dirty->records[count - 1].block_count : 0, dirty->declared};
}

/* Takes the last record back, because the index could not be changed. */
void onion_dirty_records_take_back(struct onion_dirty_records *dirty, const struct onion_dirty_records_mark *mark) {
    dirty->record_count = mark->record_count;
    dirty->declared = mark->declared;
    if (dirty->published && !dirty->is_held)
        __atomic_store_n(dirty->published, mark->record_count, __ATOMIC_RELEASE);
    if (mark->record_count)
        dirty->records[mark->record_count - 1].block_count = mark->last_blocks;
}
