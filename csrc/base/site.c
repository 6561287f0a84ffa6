/* site.c: see site.h. */
#include "base/site.h"

#include <stddef.h>
#include <string.h>

static __thread struct onion_site noted;

int onion_site_set(int status, const char *path, uint64_t offset) {
    if (status >= 0)
        return status;
    size_t length = strlen(path);
    length = length < sizeof noted.path ? length : sizeof noted.path - 1;
    memcpy(noted.path, path, length);
    noted.path[length] = 0;
    noted.offset = offset;
    noted.status = status;
    return status;
}

int onion_site_note(int status, const char *path, uint64_t offset) {
    return status >= 0 || noted.status == status ? status : onion_site_set(status, path, offset);
}

const struct onion_site *onion_site_of(int status) { return status < 0 && noted.status == status ? &noted : NULL; }

void onion_site_clear(void) { noted.status = 0; }
