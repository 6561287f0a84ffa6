/* zero_runs.c: zero_runs.h says what it promises. A block of data is left at its first byte that is not zero, mostly. */
#include "bulk/zero_runs.h"

#include <string.h>

/* Bytes that equal the ones before them, behind a zero, are all zero; memcmp is the fastest loop that the system has. */
static int reads_zero(const unsigned char *data, size_t length) {
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

size_t onion_zero_run(const unsigned char *data, size_t length, size_t block_size, int *is_zero) {
    size_t done = 0;
    do {
        size_t block = length - done < block_size ? length - done : block_size;
        int zero = reads_zero(data + done, block);
        if (done == 0)
            *is_zero = zero;
        else if (zero != *is_zero)
            break;
        done += block;
    } while (done < length);
    return done;
}

size_t onion_same_run(const unsigned char *a, const unsigned char *b, size_t length, size_t block_size, int *is_same) {
    size_t done = 0;
    do {
        size_t block = length - done < block_size ? length - done : block_size;
        int same = memcmp(a + done, b + done, block) == 0;
        if (done == 0)
            *is_same = same;
        else if (same != *is_same)
            break;
        done += block;
    } while (done < length);
    return done;
}
