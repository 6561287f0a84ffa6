/* names.c: see names.h. */
#define _GNU_SOURCE
#include "base/names.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Before Linux 6.10 the first way is root's alone. The other one needs /proc. */
static int link_file(int fd, const char *path) {
    char source[64];
    if (linkat(fd, "", AT_FDCWD, path, AT_EMPTY_PATH) == 0)
        return 0;
    if (errno != ENOENT)
        return errno;
    snprintf(source, sizeof source, "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, source, AT_FDCWD, path, AT_SYMLINK_FOLLOW) ? errno : 0;
}

static int give_name(int fd, const char *path, int replaces) {
    int error = link_file(fd, path);
    if (error != EEXIST || !replaces)
        return error;
    unlink(path);
    return link_file(fd, path);
}

/* What the kernel knows an inode by. */
struct handle {
    struct file_handle head;
    unsigned char bytes[MAX_HANDLE_SZ];
};

static int get_handle(int at, const char *path, int flags, struct handle *out) {
    int mount;
    out->head.handle_bytes = MAX_HANDLE_SZ;
    return name_to_handle_at(at, path, &out->head, &mount, flags);
}

int onion_leads_to(int fd, const char *path) {
    struct stat file, found;
    struct handle of_file, of_name;
    if (fstat(fd, &file) || fstatat(AT_FDCWD, path, &found, AT_SYMLINK_NOFOLLOW) || found.st_dev != file.st_dev ||
        found.st_ino != file.st_ino)
        return 0;
    if (get_handle(fd, "", AT_EMPTY_PATH, &of_file) || get_handle(AT_FDCWD, path, 0, &of_name))
        return 1; /* not every file system has them */
    return of_file.head.handle_type == of_name.head.handle_type &&
           of_file.head.handle_bytes == of_name.head.handle_bytes &&
           !memcmp(of_file.head.f_handle, of_name.head.f_handle, of_file.head.handle_bytes);
}

void onion_link_names(int fd, const char *const *paths, size_t count, int replaces, int *errors) {
    int is_known = 0, is_another = 0; /* of the first name: they are on the same file system */
    for (size_t i = 0; i < count; i++) {
        errors[i] = is_another ? EMLINK : give_name(fd, paths[i], replaces);
        if (errors[i] || is_known)
            continue;
        is_known = onion_leads_to(fd, paths[i]);
        is_another = !is_known;
        if (is_another) {
            errors[i] = EMLINK;
            unlink(paths[i]);
        }
    }
}

void onion_sizes(const char *const *paths, size_t count, int64_t *sizes) {
    struct stat found;
    for (size_t i = 0; i < count; i++)
        sizes[i] = stat(paths[i], &found) == 0 ? (int64_t)found.st_size : errno == ENOENT ? 0 : -errno;
}
