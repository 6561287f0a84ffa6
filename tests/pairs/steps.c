/* steps.c: makes every file operation, lock and wait of the engine a step at which a thread can be held.
 *
 * Preloaded (LD_PRELOAD) into the harness of pairs (steps.py), so that the engine has no hook of its own. Threads of an
 * actor (`pairs_enter`, and all threads that such a thread makes) count their steps. From the step on that the conductor
 * set as the actor's limit each thread says where it is and waits to be told to go on; what it is told may be an errno,
 * and then the call fails with it instead of being made. Other threads are not touched.
 *
 * What must hold:
 *  - A thread waits nowhere while it holds a lock that is not the engine's: Python gives its own up around each call that
 *    is wrapped here, and what libpython itself asks of mutexes is passed on.
 *  - A thread that would wait for a lock says so before it waits, and waits again to be told to go on when it has it. So
 *    the conductor knows that a thread is blocked, without a clock.
 *  - A sleep is not slept: it says that somebody else has to go on first.
 *  - Calls on SQLite's files are no steps: its statements are (steps.py).
 *
 * A read of the engine copies to memory that the caller gives. Where that is guarded (`pairs_guard`), the first touch of
 * each page is a step: that stands between the look-up of a block and its copy, without a hook in the engine. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define ACTORS 8
#define SLOTS 64
#define PAGE_BYTES 4096

struct record {
    int32_t kind; /* P parked, C thread made, E thread ended, B blocked, U has it, S sleeps, T passed, N note */
    int32_t slot;
    int32_t actor;
    int32_t pid;
    int64_t number;
    char label[104];
};

struct slot {
    int32_t used;
    int32_t go; /* futex */
    int32_t command;
    int32_t pad;
};

struct shared {
    int64_t limit[ACTORS];
    int64_t count[ACTORS];
    int32_t trace;
    int32_t report_fd;
    char root[PATH_MAX];
    struct slot slots[SLOTS];
};

static struct shared *shared;
static __thread int own_actor; /* number + 1; 0: not one */
static __thread int own_slot;
static __thread int catalog_errno;      /* fail the next change of SQLite's files with it */
static __thread int catalog_sync_errno; /* fail the next sync of SQLite's files with it, but for that of a log's header */
static __thread off64_t last_offset;    /* of the last write */

/* ---- talking with the conductor ---- */

static void report(int kind, int slot, int64_t number, const char *what, const char *name) {
    struct record record;
    int saved = errno;
    memset(&record, 0, sizeof record);
    record.kind = kind;
    record.slot = slot;
    record.actor = own_actor - 1;
    record.pid = getpid();
    record.number = number;
    snprintf(record.label, sizeof record.label, "%s%s%s", what, *name ? " " : "", name);
    while (syscall(SYS_write, shared->report_fd, &record, sizeof record) < 0 && errno == EINTR)
        ;
    errno = saved;
}

static int wait_for_go(void) {
    struct slot *slot = &shared->slots[own_slot];
    int saved = errno;
    while (!__atomic_load_n(&slot->go, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &slot->go, FUTEX_WAIT, 0, NULL, NULL, 0);
    __atomic_store_n(&slot->go, 0, __ATOMIC_SEQ_CST);
    errno = saved;
    return slot->command;
}

static int take_slot(void) {
    for (int i = 0; i < SLOTS; i++) {
        int32_t none = 0;
        if (__atomic_compare_exchange_n(&shared->slots[i].used, &none, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            shared->slots[i].go = 0;
            return i;
        }
    }
    abort();
}

/* A step: returns the errno that the call has to fail with, or 0. */
static int step(const char *what, const char *name) {
    if (!own_actor)
        return 0;
    int64_t number = __atomic_fetch_add(&shared->count[own_actor - 1], 1, __ATOMIC_SEQ_CST);
    if (number < __atomic_load_n(&shared->limit[own_actor - 1], __ATOMIC_SEQ_CST)) {
        if (shared->trace)
            report('T', own_slot, number, what, name);
        return 0;
    }
    report('P', own_slot, number, what, name);
    return wait_for_go();
}

EXPORT struct shared *pairs_begin(int report_fd) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        abort();
    shared->report_fd = report_fd;
    return shared;
}
EXPORT void pairs_reset(const char *root) {
    snprintf(shared->root, sizeof shared->root, "%s/", root);
    memset(shared->limit, 0, sizeof shared->limit);
    memset(shared->count, 0, sizeof shared->count);
    memset(shared->slots, 0, sizeof shared->slots);
}
EXPORT void pairs_set_limit(int actor, int64_t limit) { __atomic_store_n(&shared->limit[actor], limit, __ATOMIC_SEQ_CST); }
EXPORT int64_t pairs_count(int actor) { return __atomic_load_n(&shared->count[actor], __ATOMIC_SEQ_CST); }
EXPORT void pairs_set_trace(int trace) { shared->trace = trace; }
EXPORT void pairs_go(int slot, int command) {
    shared->slots[slot].command = command;
    __atomic_store_n(&shared->slots[slot].go, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &shared->slots[slot].go, FUTEX_WAKE, 1, NULL, NULL, 0);
}
EXPORT void pairs_enter(int actor) {
    own_slot = take_slot();
    own_actor = actor + 1;
    report('C', own_slot, 0, "begins", "");
}
EXPORT void pairs_leave(void) {
    report('E', own_slot, 0, "ends", "");
    __atomic_store_n(&shared->slots[own_slot].used, 0, __ATOMIC_SEQ_CST);
    own_actor = 0;
}
/* Steps of this thread are not counted between the two. Returns the actor. */
EXPORT int pairs_pause(void) {
    int actor = own_actor;
    own_actor = 0;
    return actor;
}
EXPORT void pairs_resume(int actor) { own_actor = actor; }
EXPORT int pairs_step(const char *what) { return step(what, ""); }
EXPORT void pairs_note(const char *what) {
    if (own_actor)
        report('N', own_slot, 0, what, "");
}
EXPORT void pairs_fail_catalog(int error) { catalog_errno = error; }
EXPORT void pairs_fail_catalog_sync(int error) { catalog_sync_errno = error; }

/* ---- threads ---- */

struct begin {
    void *(*routine)(void *);
    void *argument;
    int actor, slot;
};

static void end_thread(void *nothing) {
    (void)nothing;
    pairs_leave();
}

static void *run_thread(void *argument) {
    struct begin begin = *(struct begin *)argument;
    void *result;
    free(argument);
    own_actor = begin.actor;
    own_slot = begin.slot;
    pthread_cleanup_push(end_thread, NULL);
    result = begin.routine(begin.argument);
    pthread_cleanup_pop(1);
    return result;
}

#define NEXT(type, name, ...)                                        \
    static type (*next)(__VA_ARGS__);                                \
    if (!next)                                                       \
        next = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

EXPORT int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *argument) {
    NEXT(int, "pthread_create", pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!own_actor)
        return next(thread, attributes, routine, argument);
    struct begin *begin = malloc(sizeof *begin);
    *begin = (struct begin){routine, argument, own_actor, take_slot()};
    int slot = begin->slot;
    report('C', slot, 0, "begins", "");
    int status = next(thread, attributes, run_thread, begin);
    if (status) {
        report('E', slot, 0, "ends", "");
        shared->slots[slot].used = 0;
        free(begin);
    }
    return status;
}

/* ---- waiting ---- */

static int is_of_engine(const void *caller) {
    Dl_info info;
    if (!dladdr(caller, &info) || !info.dli_fname)
        return 0;
    return strstr(info.dli_fname, "onionskin/kernels/_") || strstr(info.dli_fname, "onionskin/nbd/_");
}

/* Makes a call that waits. The thread has what it waited for when it waits again, to be told to go on. */
#define WAITING(what, call)                       \
    ({                                            \
        report('B', own_slot, 0, what, "");       \
        int result_ = (call);                     \
        int errno_ = errno;                       \
        report('U', own_slot, 0, what, "");       \
        wait_for_go();                            \
        errno = errno_;                           \
        result_;                                  \
    })

EXPORT int sem_wait(sem_t *semaphore) {
    NEXT(int, "sem_wait", sem_t *);
    if (!own_actor || sem_trywait(semaphore) == 0)
        return own_actor ? 0 : next(semaphore);
    return WAITING("a Python lock", next(semaphore));
}
EXPORT int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    NEXT(int, "sem_timedwait", sem_t *, const struct timespec *);
    if (!own_actor || sem_trywait(semaphore) == 0)
        return own_actor ? 0 : next(semaphore, until);
    return WAITING("a Python lock", next(semaphore, until));
}
EXPORT int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    NEXT(int, "sem_clockwait", sem_t *, clockid_t, const struct timespec *);
    if (!own_actor || sem_trywait(semaphore) == 0)
        return own_actor ? 0 : next(semaphore, clock, until);
    return WAITING("a Python lock", next(semaphore, clock, until));
}
EXPORT int pthread_mutex_lock(pthread_mutex_t *mutex) {
    NEXT(int, "pthread_mutex_lock", pthread_mutex_t *);
    if (!own_actor || !is_of_engine(__builtin_return_address(0)))
        return next(mutex);
    return pthread_mutex_trylock(mutex) == 0 ? 0 : WAITING("a mutex", next(mutex));
}
EXPORT int pthread_rwlock_rdlock(pthread_rwlock_t *lock) {
    NEXT(int, "pthread_rwlock_rdlock", pthread_rwlock_t *);
    if (!own_actor || !is_of_engine(__builtin_return_address(0)))
        return next(lock);
    return pthread_rwlock_tryrdlock(lock) == 0 ? 0 : WAITING("the gate", next(lock));
}
EXPORT int pthread_rwlock_wrlock(pthread_rwlock_t *lock) {
    NEXT(int, "pthread_rwlock_wrlock", pthread_rwlock_t *);
    if (!own_actor || !is_of_engine(__builtin_return_address(0)))
        return next(lock);
    return pthread_rwlock_trywrlock(lock) == 0 ? 0 : WAITING("the gate", next(lock));
}
EXPORT int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *);
    if (!next) /* without a version it is that of before 2003, on x86-64 */
        next = (int (*)(pthread_cond_t *, pthread_mutex_t *))dlvsym(RTLD_NEXT, "pthread_cond_wait", "GLIBC_2.3.2");
    if (!next)
        next = (int (*)(pthread_cond_t *, pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_cond_wait");
    if (!own_actor || !is_of_engine(__builtin_return_address(0)))
        return next(condition, mutex);
    return WAITING("a condition", next(condition, mutex));
}
EXPORT int pthread_join(pthread_t thread, void **result) {
    NEXT(int, "pthread_join", pthread_t, void **);
    if (!own_actor || !is_of_engine(__builtin_return_address(0)))
        return next(thread, result);
    return WAITING("a thread's end", next(thread, result));
}

static int nap(void) {
    /* As long that IDLE_STEPS_MAX of them take longer than the second for which a fork asks again for a volume. */
    const struct timespec moment = {.tv_nsec = 3000000};
    report('S', own_slot, 0, "sleeps", "");
    wait_for_go();
    syscall(SYS_nanosleep, &moment, NULL);
    return 0;
}

EXPORT int nanosleep(const struct timespec *time, struct timespec *left) {
    return own_actor ? nap() : (int)syscall(SYS_nanosleep, time, left);
}
EXPORT int clock_nanosleep(clockid_t clock, int flags, const struct timespec *time, struct timespec *left) {
    NEXT(int, "clock_nanosleep", clockid_t, int, const struct timespec *, struct timespec *);
    return own_actor ? nap() : next(clock, flags, time, left);
}
EXPORT int usleep(useconds_t microseconds) {
    NEXT(int, "usleep", useconds_t);
    return own_actor ? nap() : next(microseconds);
}

/* ---- files ---- */

/* The part of a path that names what it is, with four digits of its id. NULL where it is none of ours. */
static const char *short_name(const char *path, char out[64]) {
    if (!shared || !path || strncmp(path, shared->root, strlen(shared->root)) != 0)
        return NULL;
    path += strlen(shared->root);
    if (strncmp(path, "store/", 6) == 0)
        path += 6;
    const char *end = strrchr(path, '.'), *slash = strrchr(path, '/');
    if (strcmp(path, "reserve") == 0)
        return NULL;
    if (slash && end && end - slash == 33) /* 32 digits */
        snprintf(out, 64, "%.*s/%.4s~%.20s", (int)(slash - path < 20 ? slash - path : 20), path, slash + 1, end);
    else
        snprintf(out, 64, "%.60s", path);
    return out;
}

static int is_catalog(const char *name) { return strncmp(name, "catalog.db", 10) == 0; }

static const char *name_of(int fd, char out[64]) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0)
        return NULL;
    path[length] = 0;
    return short_name(path, out);
}

static int at_path(const char *what, const char *path) {
    char out[64];
    const char *name = own_actor ? short_name(path, out) : NULL;
    return name && !is_catalog(name) ? step(what, name) : 0;
}

/* The same for a name in an open directory. */
static int at_name(const char *what, int directory, const char *path) {
    char link[64], whole[PATH_MAX];
    if (!own_actor || directory == AT_FDCWD || path[0] == '/')
        return at_path(what, path);
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    errno = saved;
    if (length < 0 || (size_t)length + strlen(path) + 2 > sizeof whole)
        return 0;
    whole[length] = '/';
    strcpy(whole + length + 1, path);
    return at_path(what, whole);
}

static int at_file(const char *what, int fd) {
    char out[64];
    const char *name = own_actor ? name_of(fd, out) : NULL;
    if (name && is_catalog(name)) {
        int is_last_sync = strcmp(what, "sync") == 0 && last_offset != 0;
        int error = is_last_sync && catalog_sync_errno ? catalog_sync_errno : catalog_errno;
        catalog_errno = 0;
        if (is_last_sync)
            catalog_sync_errno = 0;
        return error;
    }
    return name ? step(what, name) : 0;
}

#define FAIL_AT(call)              \
    do {                           \
        int error_ = (call);       \
        if (error_ > 0) {          \
            errno = error_;        \
            return -1;             \
        }                          \
    } while (0)

static int open_stepped(int directory, const char *path, int flags, mode_t mode) {
    FAIL_AT(at_name(flags & O_CREAT ? "create" : "open", directory, path));
    return (int)syscall(SYS_openat, directory, path, flags, mode);
}

#define OPEN(name)                                                                                      \
    EXPORT int name(const char *path, int flags, ...) {                                                 \
        va_list arguments;                                                                              \
        va_start(arguments, flags);                                                                     \
        mode_t mode = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, int) : 0; \
        va_end(arguments);                                                                              \
        return open_stepped(AT_FDCWD, path, flags, mode);                                               \
    }
#define OPENAT(name)                                                                                    \
    EXPORT int name(int directory, const char *path, int flags, ...) {                                  \
        va_list arguments;                                                                              \
        va_start(arguments, flags);                                                                     \
        mode_t mode = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, int) : 0; \
        va_end(arguments);                                                                              \
        return open_stepped(directory, path, flags, mode);                                              \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

EXPORT int unlink(const char *path) {
    FAIL_AT(at_path("unlink", path));
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
EXPORT int unlinkat(int directory, const char *path, int flags) {
    FAIL_AT(at_name("unlink", directory, path));
    return (int)syscall(SYS_unlinkat, directory, path, flags);
}
EXPORT int rename(const char *from, const char *to) {
    FAIL_AT(at_path("rename", to));
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
EXPORT int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    FAIL_AT(at_name("rename", to_directory, to));
    return (int)syscall(SYS_renameat2, from_directory, from, to_directory, to, 0);
}
EXPORT int renameat2(int from_directory, const char *from, int to_directory, const char *to, unsigned flags) {
    FAIL_AT(at_name("rename", to_directory, to));
    return (int)syscall(SYS_renameat2, from_directory, from, to_directory, to, flags);
}
EXPORT int link(const char *from, const char *to) {
    FAIL_AT(at_path("link", to));
    return (int)syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
EXPORT int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags) {
    FAIL_AT(at_name("link", to_directory, to));
    return (int)syscall(SYS_linkat, from_directory, from, to_directory, to, flags);
}
EXPORT int stat(const char *path, struct stat *out) {
    (void)at_path("stat", path);
    return (int)syscall(SYS_newfstatat, AT_FDCWD, path, out, 0);
}
EXPORT int stat64(const char *path, struct stat64 *out) { return stat(path, (struct stat *)out); }
EXPORT DIR *opendir(const char *path) {
    NEXT(DIR *, "opendir", const char *);
    (void)at_path("list", path);
    return next(path);
}
EXPORT ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
    last_offset = offset;
    FAIL_AT(at_file("write", fd));
    return syscall(SYS_pwrite64, fd, bytes, length, offset);
}
EXPORT ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return pwrite64(fd, bytes, length, offset); }
EXPORT ssize_t pread64(int fd, void *bytes, size_t length, off64_t offset) {
    char out[64];
    const char *name = own_actor ? name_of(fd, out) : NULL;
    if (name && (strstr(name, ".seg") || strstr(name, ".img")))
        FAIL_AT(step("read", name));
    return syscall(SYS_pread64, fd, bytes, length, offset);
}
EXPORT ssize_t pread(int fd, void *bytes, size_t length, off_t offset) { return pread64(fd, bytes, length, offset); }
EXPORT int fsync(int fd) {
    FAIL_AT(at_file("sync", fd));
    return (int)syscall(SYS_fsync, fd);
}
EXPORT int fdatasync(int fd) {
    FAIL_AT(at_file("sync", fd));
    return (int)syscall(SYS_fdatasync, fd);
}
EXPORT int ftruncate64(int fd, off64_t length) {
    FAIL_AT(at_file("truncate", fd));
    return (int)syscall(SYS_ftruncate, fd, length);
}
EXPORT int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t length) {
    FAIL_AT(at_file(mode & FALLOC_FL_PUNCH_HOLE ? "punch" : "allocate", fd));
    return (int)syscall(SYS_fallocate, fd, mode, offset, length);
}
EXPORT int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }
EXPORT int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    int error = at_file("allocate", fd);
    return error > 0 ? error : syscall(SYS_fallocate, fd, 0, offset, length) < 0 ? errno : 0;
}
EXPORT int posix_fallocate(int fd, off_t offset, off_t length) { return posix_fallocate64(fd, offset, length); }
EXPORT ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t length, unsigned flags) {
    FAIL_AT(at_file("copy to", to));
    return syscall(SYS_copy_file_range, from, from_offset, to, to_offset, length, flags);
}
EXPORT int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == FICLONE || request == FICLONERANGE)
        (void)at_file("share", fd);
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* ---- locks ---- */

static int lock_stepped(int fd, int command, struct flock *lock) {
    char out[64], label[64];
    const char *name = own_actor ? name_of(fd, out) : NULL;
    if (!name || is_catalog(name) || lock->l_type == F_UNLCK)
        return (int)syscall(SYS_fcntl, fd, command, lock);
    snprintf(label, sizeof label, "%.40s %s", name, lock->l_type == F_WRLCK ? "alone" : "shared");
    (void)step("lock", label);
    while (1) {
        int result = (int)syscall(SYS_fcntl, fd, F_OFD_SETLK, lock);
        if (result == 0 || command == F_OFD_SETLK || (errno != EAGAIN && errno != EACCES))
            return result;
        nap();
    }
}

static int fcntl_stepped(int fd, int command, void *argument) {
    if (own_actor && (command == F_OFD_SETLK || command == F_OFD_SETLKW))
        return lock_stepped(fd, command, argument);
    return (int)syscall(SYS_fcntl, fd, command, argument);
}

#define FCNTL(name)                                \
    EXPORT int name(int fd, int command, ...) {    \
        va_list arguments;                         \
        va_start(arguments, command);              \
        void *argument = va_arg(arguments, void *); \
        va_end(arguments);                         \
        return fcntl_stepped(fd, command, argument); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* ---- the copy of a read ---- */

static __thread struct {
    char *low, *high;
} guarded;
static struct sigaction segv_before;

static void on_segv(int number, siginfo_t *info, void *context) {
    char *page = (char *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE_BYTES - 1));
    if (page >= guarded.low && page < guarded.high) {
        int saved = errno;
        mprotect(page, PAGE_BYTES, PROT_READ | PROT_WRITE);
        (void)step("copy of a read", "");
        errno = saved;
        return;
    }
    (void)number, (void)context;
    sigaction(SIGSEGV, &segv_before, NULL); /* the instruction runs again, and fails under what was there before */
}

/* The next touch of each page of the buffer by this thread is a step. */
EXPORT void pairs_guard(void *buffer, size_t length) {
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    static int installed;
    struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_NODEFER};
    pthread_mutex_lock(&once);
    if (!installed)
        sigaction(SIGSEGV, &action, &segv_before);
    installed = 1;
    pthread_mutex_unlock(&once);
    guarded.low = buffer;
    guarded.high = guarded.low + length;
    mprotect(buffer, length, PROT_NONE);
}
EXPORT void pairs_unguard(void) {
    mprotect(guarded.low, (size_t)(guarded.high - guarded.low), PROT_READ | PROT_WRITE);
    guarded.low = guarded.high = NULL;
}
