/* pages.h: looks at pages of guest RAM: which hold nothing but zeros, and which differ from the page that a snapshot has.
 *
 * These two passes over memory are what a snapshot of RAM costs beside its writing, so they run at the speed of memory.
 * Both arrays are aligned to a page. The functions only read; somebody else may write to the pages meanwhile, and then
 * the answer is about one of the states that the page had. */
#ifndef ONIONSKIN_MACHINE_PAGES_H
#define ONIONSKIN_MACHINE_PAGES_H

#include <stddef.h>
#include <stdint.h>

enum { ONION_PAGE_BYTES = 4096 };

enum onion_page_kind {
    ONION_PAGE_SAME = 0, /* as in the snapshot */
    ONION_PAGE_ZERO = 1, /* zeros, and other bytes in the snapshot; without a snapshot: zeros */
    ONION_PAGE_DATA = 2  /* other bytes than the snapshot's, and not only zeros */
};

/* Says of each of `count` pages what it is beside the page of the snapshot at the same place (parent may be NULL: no
 * snapshot). Returns the number of pages that are not SAME. */
size_t onion_pages_classify(const uint8_t *pages, const uint8_t *parent, size_t count, uint8_t *kinds);

#endif
