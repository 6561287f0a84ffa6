/* The physical limit: the same blocks of a flat raw file, by one system call each, in a loop without Python. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

int flat_pread(int fd, const uint64_t *block_indices, uint64_t count, uint32_t block_size, unsigned char *out)
{
    for (uint64_t i = 0; i < count; i++)
        if (pread(fd, out + i * block_size, block_size, (off_t)(block_indices[i] * block_size)) != (ssize_t)block_size)
            return -1;
    return 0;
}

int flat_pwrite(int fd, const uint64_t *block_indices, uint64_t count, uint32_t block_size, const unsigned char *data)
{
    for (uint64_t i = 0; i < count; i++)
        if (pwrite(fd, data + i * block_size, block_size, (off_t)(block_indices[i] * block_size)) != (ssize_t)block_size)
            return -1;
    return 0;
}

int flat_copy(const unsigned char *mapped, const uint64_t *block_indices, uint64_t count, uint32_t block_size,
              unsigned char *out)
{
    for (uint64_t i = 0; i < count; i++)
        memcpy(out + i * block_size, mapped + block_indices[i] * block_size, block_size);
    return 0;
}
