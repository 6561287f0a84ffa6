/* zero_runs.h: finds the zero blocks of a buffer, and the blocks that two buffers have in common: import and delta leave
 * them out instead of storing them. */
#ifndef ONIONSKIN_BULK_ZERO_RUNS_H
#define ONIONSKIN_BULK_ZERO_RUNS_H

#include <stddef.h>

/* Returns how many bytes from the start of `data` are blocks of one kind: blocks of zeros only, or blocks with other
 * bytes. *is_zero says which. The last block may be short. `length` and `block_size` are not 0. */
size_t onion_zero_run(const unsigned char *data, size_t length, size_t block_size, int *is_zero);
/* The same of two buffers: of blocks that are the same in both, or of blocks that are not. *is_same says which. */
size_t onion_same_run(const unsigned char *a, const unsigned char *b, size_t length, size_t block_size, int *is_same);

#endif
