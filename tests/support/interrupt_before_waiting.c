/* interrupt_before_waiting.c: is preloaded into a program, and interrupts it just before its first wait for input.
 *
 * That is where Python has looked for signals, and the call that waits has not begun. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

static int is_struck;

static void strike(void) {
    if (!is_struck) {
        is_struck = 1;
        raise(SIGINT);
    }
}

int poll(struct pollfd *files, nfds_t count, int milliseconds) {
    int (*wait)(struct pollfd *, nfds_t, int) = (int (*)(struct pollfd *, nfds_t, int))dlsym(RTLD_NEXT, "poll");
    if (count && files[0].fd == STDIN_FILENO && milliseconds < 0)
        strike();
    return wait(files, count, milliseconds);
}

ssize_t read(int file, void *bytes, size_t count) {
    ssize_t (*take)(int, void *, size_t) = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    if (file == STDIN_FILENO)
        strike();
    return take(file, bytes, count);
}
