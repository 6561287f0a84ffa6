/* mappings.h: counts the mappings of files that this process may come to need. The system lets a process have
 * vm.max_map_count.
 *
 * A segment is mapped when it is first read, and a read must not fail because no mapping is left. So an opening
 * sets aside one mapping for each file that it may read, and is refused if fewer are left. An eighth of all
 * mappings is kept for everything else: libraries, threads, memory. */
#ifndef ONIONSKIN_BASE_MAPPINGS_H
#define ONIONSKIN_BASE_MAPPINGS_H

#include <stdint.h>

/* 0, or ONION_E_MAPPINGS. */
int onion_mappings_take(uint64_t count);
void onion_mappings_give_back(uint64_t count);

#endif
