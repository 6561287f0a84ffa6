/* sparse_table.h: a table of zeros that is large and of which few entries are used.
 *
 * Its pages come when they are touched. calloc would touch all of them as soon as the allocator had such a piece left
 * over from before, and that took a tenth of the time of an opening. */
#ifndef ONIONSKIN_BASE_SPARSE_TABLE_H
#define ONIONSKIN_BASE_SPARSE_TABLE_H

#include <stddef.h>
#include <sys/mman.h>

/* Returns NULL if there is no memory. */
static inline void *onion_sparse_table(size_t bytes) {
    void *table = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (table == MAP_FAILED)
        return NULL;
    (void)madvise(table, bytes, MADV_NOHUGEPAGE);
    return table;
}

/* `table` may be NULL. */
static inline void onion_sparse_table_free(void *table, size_t bytes) {
    if (table)
        munmap(table, bytes);
}

#endif
