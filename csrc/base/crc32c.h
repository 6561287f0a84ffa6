/* crc32c.h: CRC-32C (Castagnoli, RFC 3720 appendix B.4), with the processor's instruction where it has one.
 *
 * crc is 0 for the first part, and the earlier result for each part that follows. The functions are pure, and any
 * thread may call them. */
#ifndef ONIONSKIN_BASE_CRC32C_H
#define ONIONSKIN_BASE_CRC32C_H
#include <stddef.h>
#include <stdint.h>

uint32_t onion_crc32c(uint32_t crc, const void *bytes, size_t length);
/* The plain table version, with which the fast one is compared. */
uint32_t onion_crc32c_reference(uint32_t crc, const void *bytes, size_t length);

#endif
