/* A file system that has an inode for each name and says the same number for all: no name stays of what was asked for. */
#define _GNU_SOURCE
#include "base/names.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(holds) ((holds) ? (void)0 : (printf("%s:%d: %s\n", __FILE__, __LINE__, #holds), exit(1)))

static enum { ONE, EACH_ITS_OWN, NONE } handles;

/* In place of that of the system. */
int name_to_handle_at(int at, const char *path, struct file_handle *out, int *mount, int flags) {
    (void)at, (void)flags;
    if (handles == NONE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    *mount = 0;
    out->handle_type = 1;
    out->handle_bytes = 1;
    out->f_handle[0] = handles == ONE ? 0 : (unsigned char)strlen(path);
    return 0;
}

int main(void) {
    const char *const names[] = {"check_names.one", "check_names.two"};
    int errors[2];
    int fd = open("check_names.file", O_CREAT | O_RDWR, 0600);
    CHECK(fd >= 0);
    for (handles = ONE; handles <= NONE; handles++) {
        onion_link_names(fd, names, 2, 0, errors);
        for (int i = 0; i < 2; i++) {
            CHECK(errors[i] == (handles == EACH_ITS_OWN ? EMLINK : 0));
            CHECK((unlink(names[i]) == 0) == (errors[i] == 0));
        }
    }
    close(fd);
    return unlink("check_names.file");
}
