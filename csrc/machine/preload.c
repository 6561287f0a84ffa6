/* preload.c: the part that must run inside the hypervisor's process. It is loaded there by LD_PRELOAD.
 *
 * The hypervisor maps guest RAM shared over a file; this library maps it privately instead, so the file stays what the
 * snapshot was, forks share its page cache, and going back means to forget the private pages. Only the process itself can
 * arm a userfaultfd over its memory and drop pages of it, and nobody reads a file into it as fast; so a thread waits for
 * these requests on a socket.
 *
 * ONIONSKIN_RAM is the path of the RAM file, ONIONSKIN_PRELOAD the path of the socket. ONIONSKIN_STAND_IN is an empty file
 * that the hypervisor was told to map; the library maps the RAM file in its place. So a process that the library is not in (it
 * has capabilities, it is linked statically, a script started it) never sees the RAM file, and writes to the empty one. All
 * of them, and LD_PRELOAD, are taken out of the environment, so that programs which the hypervisor starts are left alone.
 *
 * While the process lives it has a shared lock (flock) on the RAM file that it maps: so nobody wipes the file under it. It
 * cannot give room of that file back either (fallocate): a balloon would, and forks that map it would lose what they read.
 *
 * A process may be started before it is known what it is to run: it loads its libraries, which takes a third of its start, and
 * waits. ONIONSKIN_WAIT is the descriptor of a socket then, by which it gets the rest. It ends with whoever has the other end,
 * until it was told to go on, and from then on its errors go to the log by which it is found. Meanwhile it has the memory that
 * it will need first (ONIONSKIN_ROOM bytes): the kernel takes longer to give 14 MiB than to read a file of that length.
 *
 * What must hold: the RAM file is mapped privately and under that lock, or not at all: forks read it, and a hypervisor that
 * maps it shared writes to it before anybody can ask. Whatever else fails is said when it is asked for. Only the user who
 * runs the hypervisor, and root, are answered. The library links nothing of onionskin or Python. */
#define _GNU_SOURCE
#include "machine/preload.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/workers.h"

#ifndef SYS_pidfd_open /* two calls that headers which a wheel is built with may not know; all processors have them here */
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#define FEATURE_SHMEM (1ull << 12)       /* UFFD_FEATURE_WP_HUGETLBFS_SHMEM */
#define FEATURE_UNPOPULATED (1ull << 13) /* UFFD_FEATURE_WP_UNPOPULATED */
#define FEATURE_ASYNC (1ull << 15)       /* UFFD_FEATURE_WP_ASYNC, Linux 6.7 */

enum {
    RUNS_AT_ONCE = 512,
    RUNS_TO_FILL = 1024,
    RUNS_OF_PART = 32,
    PART_BYTES = 1 << 18,
    TWO_THREADS_BYTES = 1 << 20,
    WORDS_BYTES_MAX = 256 << 10
};

typedef void *(*map_function)(void *, size_t, int, int, int, off_t);
typedef int (*main_function)(int, char **, char **);
typedef int (*start_function)(main_function, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

static struct {
    char ram[4096], stand_in[4096]; /* the same where nothing stands in */
    int failed;                     /* the errno because of which nobody can be answered, so that RAM is not mapped */
    struct sockaddr_un address;
    pthread_mutex_t guard; /* over what follows, which the thread of the socket and those that map use */
    uint8_t *start;
    size_t length;
    dev_t device; /* of the file that the hypervisor means to map there */
    ino_t file;
    int is_private;
    int faults;  /* the userfaultfd, -1 before it is armed */
    int self;    /* a descriptor of this process, -1 where there is none */
    int waits;   /* the socket by which it is said what to run, -1 where that is known */
    size_t room; /* of memory to have by then */
} preload = {.guard = PTHREAD_MUTEX_INITIALIZER, .faults = -1, .self = -1, .waits = -1};

/* ---- what is mapped ---- */

/* Whether a file is what stands in for the RAM file, or -errno where that cannot be seen of one that is as long. The name of
 * that goes once it is mapped; its inode stays its own, since the hypervisor has it open. */
static int is_ram(int fd, size_t length) {
    struct stat mapped, wanted = {0};
    if (!preload.ram[0] || fd < 0 || fstat(fd, &mapped) || !S_ISREG(mapped.st_mode) ||
        (uint64_t)mapped.st_size != length)
        return 0;
    pthread_mutex_lock(&preload.guard);
    int is_mapped = preload.start != NULL;
    wanted.st_dev = preload.device;
    wanted.st_ino = preload.file;
    pthread_mutex_unlock(&preload.guard);
    if (!is_mapped && stat(preload.stand_in, &wanted))
        return -errno;
    return mapped.st_dev == wanted.st_dev && mapped.st_ino == wanted.st_ino;
}

/* Opens the RAM file and locks it as long as the process lives: a descriptor that is meant to stay open, or -errno. It is one
 * of this library's own: the hypervisor may close its descriptor, and has locks of another kind. */
static int open_ram(int mapped, size_t length) {
    struct stat file, locked;
    int fd = open(preload.ram, O_RDONLY | O_CLOEXEC), stands_in = strcmp(preload.ram, preload.stand_in) != 0;
    if (fd < 0)
        return -errno;
    int error = flock(fd, LOCK_SH | LOCK_NB) || fstat(fd, &locked) || fstat(mapped, &file) ? -errno : 0;
    if (!error && !stands_in && (file.st_dev != locked.st_dev || file.st_ino != locked.st_ino))
        error = -ESTALE;
    if (!error && (!S_ISREG(locked.st_mode) || (uint64_t)locked.st_size != length))
        error = -ESTALE;
    if (error)
        close(fd);
    return error ? error : fd;
}

static void *map(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    static map_function real;
    if (!real)
        real = (map_function)dlsym(RTLD_NEXT,
                                   "mmap"); /* its offset has 64 bits too: this is built for such machines alone */
    int found = offset || (flags & MAP_TYPE) == MAP_PRIVATE ? 0 : is_ram(fd, length);
    int ram = found <= 0 ? found : preload.failed ? -preload.failed : open_ram(fd, length);
    if (ram < 0) {
        errno = -ram;
        return MAP_FAILED;
    }
    if (found)
        flags = (flags & ~MAP_TYPE) | MAP_PRIVATE;
    void *mapped = real(address, length, protection, flags, found ? ram : fd, offset);
    if (found && mapped != MAP_FAILED) {
        struct stat mapped_file = {0};
        (void)fstat(fd, &mapped_file);
        pthread_mutex_lock(&preload.guard);
        preload.start = mapped;
        preload.length = length;
        preload.device = mapped_file.st_dev;
        preload.file = mapped_file.st_ino;
        preload.is_private = 1;
        pthread_mutex_unlock(&preload.guard);
    }
    return mapped;
}

#ifdef __GLIBC__ /* programs that are built for large files call it by this name; musl has the other one alone */
__attribute__((visibility("default"))) void *mmap64(void *address, size_t length, int protection, int flags, int fd,
                                                    off_t offset) {
    return map(address, length, protection, flags, fd, offset);
}
#endif

__attribute__((visibility("default"))) void *mmap(void *address, size_t length, int protection, int flags, int fd,
                                                  off_t offset) {
    return map(address, length, protection, flags, fd, offset);
}

/* ---- what must not be done to the file ---- */

static int is_mapped_file(int fd) {
    struct stat file;
    if (fstat(fd, &file))
        return 0;
    pthread_mutex_lock(&preload.guard);
    int is_it = preload.is_private && file.st_dev == preload.device && file.st_ino == preload.file;
    pthread_mutex_unlock(&preload.guard);
    return is_it;
}

static int allocate(int fd, int mode, off_t offset, off_t length) {
    static int (*real)(int, int, off_t, off_t);
    if (!real)
        real = (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate");
    if (mode && is_mapped_file(fd)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return real(fd, mode, offset, length);
}

#ifdef __GLIBC__
__attribute__((visibility("default"))) int fallocate64(int fd, int mode, off_t offset, off_t length) {
    return allocate(fd, mode, offset, length);
}
#endif

__attribute__((visibility("default"))) int fallocate(int fd, int mode, off_t offset, off_t length) {
    return allocate(fd, mode, offset, length);
}

/* ---- what is asked for ---- */

static int protect(uint64_t start, uint64_t length) {
    struct uffdio_writeprotect range = {.range = {start, length}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    return ioctl(preload.faults, UFFDIO_WRITEPROTECT, &range) ? -errno : 0;
}

static int open_faults(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM))
        return -errno; /* the call might say that it is not permitted */
    int flags = O_CLOEXEC | O_NONBLOCK;
    int faults = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, flags) : (int)syscall(SYS_userfaultfd, flags);
    /* Anybody may have one whose faults in the kernel go unanswered. No fault is answered here: the kernel only notes them. */
    if (faults < 0 && errno == EPERM)
        faults = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    int error = faults < 0 ? -errno : 0;
    if (device >= 0)
        close(device);
    return error ? error : faults;
}

/* Arms the userfaultfd, where that was not done yet, and protects all of RAM. */
static int arm(void) {
    if (!preload.start)
        return -ENOENT;
    if (preload.faults < 0) {
        int faults = open_faults();
        if (faults < 0)
            return faults;
        struct uffdio_api api = {.api = UFFD_API, .features = FEATURE_SHMEM | FEATURE_UNPOPULATED | FEATURE_ASYNC};
        struct uffdio_register all = {.range = {(uint64_t)(uintptr_t)preload.start, preload.length},
                                      .mode = UFFDIO_REGISTER_MODE_WP};
        if (ioctl(faults, UFFDIO_API, &api) || ioctl(faults, UFFDIO_REGISTER, &all)) {
            int error = -errno;
            close(faults);
            return error;
        }
        preload.faults = faults;
    }
    return protect((uint64_t)(uintptr_t)preload.start, preload.length);
}

/* Says whether a run may be dropped: 0 or -errno. */
static int check(const struct onion_preload_run *run) {
    if (!preload.start || !preload.is_private)
        return -ENOENT;
    if (run->offset % 4096 || run->length % 4096 || run->offset > preload.length ||
        run->length > preload.length - run->offset)
        return -EINVAL;
    return 0;
}

/* Drops the private pages of many runs in one call, after which processors are told once instead of once for each run.
 * Returns 0 where the kernel does not do all of that for a process itself (Linux 6.13 does). */
static int forget_at_once(const struct onion_preload_run *runs, size_t count) {
    struct iovec parts[RUNS_AT_ONCE];
    uint64_t length = 0;
    for (size_t i = 0; i < count; i++) {
        parts[i] = (struct iovec){preload.start + runs[i].offset, runs[i].length};
        length += runs[i].length;
    }
    return syscall(SYS_process_madvise, preload.self, parts, count, MADV_DONTNEED, 0) == (ssize_t)length;
}

/* Drops the private pages of runs, so that they read as the file. On Linux 6.18 a page that was written since the last scan
 * counts as written still, and one that a scan has protected stays protected and counts as clean. Other kernels may count
 * that one too, so nobody relies on it: who asked for this protects all of them with the next scan, in one call. */
static int forget(const struct onion_preload_run *runs, size_t count) {
    int status = 0;
    for (size_t i = 0; i < count && !status; i++)
        status = check(&runs[i]);
    if (status || (preload.self >= 0 && forget_at_once(runs, count)))
        return status;
    for (size_t i = 0; i < count; i++)
        if (madvise(preload.start + runs[i].offset, runs[i].length, MADV_DONTNEED))
            return -errno;
    return 0;
}

/* ---- filling ---- */

/* Runs to be filled from a file, of which each thread takes parts. */
struct filling {
    const struct onion_preload_run *runs;
    size_t count;
    size_t at;     /* the run in which the next part begins */
    uint64_t done; /* bytes of it that were taken */
    int file;
    int error;
    pthread_mutex_t guard; /* over `at`, `done` and `error` */
};

/* Takes the next part of the runs: up to RUNS_OF_PART of them, or a piece of a long one. Returns how many they are. */
static size_t take_part(struct filling *filling, struct onion_preload_run *part) {
    size_t count = 0;
    uint64_t length = 0;
    pthread_mutex_lock(&filling->guard);
    while (!filling->error && filling->at < filling->count && count < RUNS_OF_PART && length < PART_BYTES) {
        const struct onion_preload_run *run = &filling->runs[filling->at];
        uint64_t left = run->length - filling->done, room = PART_BYTES - length, bytes = left < room ? left : room;
        part[count++] = (struct onion_preload_run){run->offset + filling->done, bytes};
        length += bytes;
        filling->done = bytes < left ? filling->done + bytes : 0;
        filling->at += bytes == left;
    }
    pthread_mutex_unlock(&filling->guard);
    return count;
}

static int fill_run(int file, struct onion_preload_run run) {
    while (run.length) {
        ssize_t got = pread(file, preload.start + run.offset, run.length, (off_t)run.offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        run.offset += (uint64_t)got;
        run.length -= (uint64_t)got;
    }
    return 0;
}

static void *fill_parts(void *argument) {
    struct filling *filling = argument;
    struct onion_preload_run part[RUNS_OF_PART];
    for (size_t count; (count = take_part(filling, part));)
        for (size_t i = 0; i < count; i++) {
            int error = fill_run(filling->file, part[i]);
            if (!error)
                continue;
            pthread_mutex_lock(&filling->guard);
            filling->error = error;
            pthread_mutex_unlock(&filling->guard);
            return NULL;
        }
    return NULL;
}

/* Writes to runs what a file has there. The guest stands still, so a processor is there for a second thread. */
static int fill(const struct onion_preload_run *runs, size_t count, int file) {
    uint64_t length = 0;
    int status = file < 0 ? -EBADF : 0;
    for (size_t i = 0; i < count && !status; i++) {
        status = check(&runs[i]);
        length += runs[i].length;
    }
    if (status)
        return status;
    struct filling filling = {.runs = runs, .count = count, .file = file, .guard = PTHREAD_MUTEX_INITIALIZER};
    onion_run_workers(fill_parts, &filling, length < TWO_THREADS_BYTES ? 1 : 2);
    return filling.error;
}

/* ---- the socket ---- */

static int receive_all(int connection, void *to, size_t length) {
    for (size_t done = 0; done < length;) {
        ssize_t got = recv(connection, (char *)to + done, length - done, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        done += (size_t)got;
    }
    return 1;
}

/* Receives a request, and the descriptor that comes with it, or -1. Returns 0 where the connection ended. */
static int receive_request(int connection, struct onion_preload_request *request, int *file) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {request, sizeof *request};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got;
    *file = -1;
    do
        got = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    const struct cmsghdr *first = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (first && first->cmsg_level == SOL_SOCKET && first->cmsg_type == SCM_RIGHTS &&
        first->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(file, CMSG_DATA(first), sizeof *file);
    return got > 0 && receive_all(connection, (char *)request + got, sizeof *request - (size_t)got);
}

/* Takes the runs of a request to forget. Returns 0 where the connection ended. */
static int forget_all(int connection, uint64_t count, int *status) {
    struct onion_preload_run runs[RUNS_AT_ONCE];
    while (count) {
        size_t part = count < RUNS_AT_ONCE ? count : RUNS_AT_ONCE;
        if (!receive_all(connection, runs, part * sizeof runs[0]))
            return 0;
        if (!*status)
            *status = forget(runs, part);
        count -= part;
    }
    return 1;
}

/* As forget_all, of a request to fill. There are many at once, as each call may start a thread. */
static int fill_all(int connection, uint64_t count, int file, int *status) {
    static struct onion_preload_run runs[RUNS_TO_FILL]; /* of the one thread that answers */
    while (count) {
        size_t part = count < RUNS_TO_FILL ? count : RUNS_TO_FILL;
        if (!receive_all(connection, runs, part * sizeof runs[0]))
            return 0;
        if (!*status)
            *status = fill(runs, part, file);
        count -= part;
    }
    return 1;
}

static int answer_request(int connection, const struct onion_preload_request *request, int file) {
    int status = 0, goes_on = 1;
    pthread_mutex_lock(&preload.guard);
    if (request->verb == ONION_PRELOAD_ARM)
        status = arm();
    else if (request->verb == ONION_PRELOAD_FORGET)
        goes_on = forget_all(connection, request->count, &status);
    else if (request->verb == ONION_PRELOAD_FILL)
        goes_on = fill_all(connection, request->count, file, &status);
    else if (request->verb != ONION_PRELOAD_WHERE)
        status = -ENOSYS;
    struct onion_preload_reply reply = {.magic = ONION_PRELOAD_MAGIC,
                                        .status = status,
                                        .start = (uint64_t)(uintptr_t)preload.start,
                                        .length = preload.length,
                                        .is_private = (uint32_t)preload.is_private,
                                        .is_armed = preload.faults >= 0};
    pthread_mutex_unlock(&preload.guard);
    return goes_on && send(connection, &reply, sizeof reply, MSG_NOSIGNAL) == sizeof reply;
}

static int answer(int connection) {
    struct onion_preload_request request;
    int file, goes_on = receive_request(connection, &request, &file) && request.magic == ONION_PRELOAD_MAGIC &&
                        answer_request(connection, &request, file);
    if (file >= 0)
        close(file);
    return goes_on;
}

static int may_connect(int connection) {
    struct ucred peer;
    socklen_t length = sizeof peer;
    if (getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) || (peer.uid && peer.uid != geteuid()))
        return 0;
    /* It reads and writes RAM from outside. Where Yama is (ptrace_scope 1), only an ancestor may else, and a supervisor that
     * took the machine over is none. */
    (void)prctl(PR_SET_PTRACER, (unsigned long)peer.pid, 0, 0, 0);
    return 1;
}

static void *serve(void *socket_of_listener) {
    int listener = (int)(intptr_t)socket_of_listener;
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0) {
            if (errno != EINTR && errno != ECONNABORTED)
                usleep(100000); /* no descriptor or no memory is left */
            continue;
        }
        int goes_on = may_connect(connection);
        while (goes_on && answer(connection))
            ;
        close(connection);
    }
    return NULL;
}

/* Returns a listening socket, or -errno. */
static int listen_at_path(void) {
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0)
        return -errno;
    mode_t before = umask(0177); /* nothing else of the process runs yet */
    int failed = bind(listener, (struct sockaddr *)&preload.address, sizeof preload.address) || listen(listener, 4);
    int error = failed ? -errno : 0;
    umask(before);
    if (failed) {
        close(listener);
        return error;
    }
    return listener;
}

/* Listens, in a thread: 0 or an errno. */
static int begin_to_serve(void) {
    pthread_t thread;
    int listener = listen_at_path();
    if (listener < 0)
        return -listener;
    int error = pthread_create(&thread, NULL, serve, (void *)(intptr_t)listener);
    if (error)
        close(listener);
    else
        pthread_detach(thread);
    return error;
}

/* Takes a variable out of the environment. unsetenv of a shell is its own (bash), and does nothing before its main. */
static void forget_variable(const char *name) {
    size_t length = strlen(name);
    char **kept = environ;
    for (char **one = environ; *one; one++)
        if (strncmp(*one, name, length) || (*one)[length] != '=')
            *kept++ = *one;
    *kept = NULL;
}

/* Returns whether these can be names of the RAM file, of what stands in for it, and of the socket. */
static int begin(const char *ram, const char *stand_in, const char *path) {
    if (strlen(ram) >= sizeof preload.ram || strlen(stand_in) >= sizeof preload.stand_in ||
        strlen(path) >= sizeof preload.address.sun_path)
        return 0;
    preload.address.sun_family = AF_UNIX;
    strcpy(preload.address.sun_path, path);
    preload.failed = begin_to_serve();
    preload.self = (int)syscall(SYS_pidfd_open, getpid(), 0);
    strcpy(preload.stand_in, stand_in);
    strcpy(preload.ram, ram); /* from here on RAM is mapped privately: somebody listens who can say so, or not at all */
    return 1;
}

__attribute__((constructor)) static void start(void) {
    const char *ram = getenv("ONIONSKIN_RAM"), *path = getenv("ONIONSKIN_PRELOAD");
    const char *stand_in = getenv("ONIONSKIN_STAND_IN"), *waits = getenv("ONIONSKIN_WAIT");
    const char *room = getenv("ONIONSKIN_ROOM");
    if (waits) {
        preload.waits = atoi(waits);
        preload.room = room ? strtoull(room, NULL, 10) : 0;
    } else if (!ram || !path || !begin(ram, stand_in ? stand_in : ram, path)) {
        return;
    }
    forget_variable("ONIONSKIN_WAIT");
    forget_variable("ONIONSKIN_ROOM");
    forget_variable("ONIONSKIN_RAM");
    forget_variable("ONIONSKIN_STAND_IN");
    forget_variable("ONIONSKIN_PRELOAD");
    forget_variable("LD_PRELOAD");
}

/* ---- a process that waits for what it is to run ---- */

/* Receives a message with a descriptor: its length, or 0 where none came, or another one. */
static size_t receive_with_descriptor(char *text, size_t room, int *descriptor) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } with;
    struct iovec part = {text, room};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = with.room, .msg_controllen = sizeof with.room};
    ssize_t got;
    do
        got = recvmsg(preload.waits, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *found = CMSG_FIRSTHDR(&message);
    if (got <= 0 || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || !found || found->cmsg_type != SCM_RIGHTS)
        return 0;
    memcpy(descriptor, CMSG_DATA(found), sizeof *descriptor);
    return (size_t)got;
}

/* Says that this process can be found by its log, and waits for the word to go on. Nothing comes where who started it is gone:
 * another one may have the machine by then. */
static int may_go_on(void) {
    char word = 0;
    return send(preload.waits, "", 1, MSG_NOSIGNAL) == 1 && receive_all(preload.waits, &word, 1);
}

/* Shows the words in the place of those that the process was started with, as far as there is room. */
static void show_words(char **shown, int count, char **words) {
    char *at = shown[0], *end = shown[count - 1] + strlen(shown[count - 1]);
    memset(at, 0, (size_t)(end - at));
    for (; *words && strlen(*words) < (size_t)(end - at); words++) {
        strcpy(at, *words);
        at += strlen(at) + 1;
    }
}

/* Waits for the words of the command line, before which come the directory, the log, and what the environment has otherwise.
 * Returns them, or ends the process. They stay as long as it lives. */
static char **wait_for_words(int *count) {
    enum { DIRECTORY, RAM, STAND_IN, PATH, FIRST };
    char *text = malloc(WORDS_BYTES_MAX);
    int log = -1, found = 0;
    size_t length = text ? receive_with_descriptor(text, WORDS_BYTES_MAX, &log) : 0;
    if (!length || text[length - 1] || dup2(log, 1) < 0 || dup2(log, 2) < 0)
        _exit(1);
    close(log);
    for (size_t i = 0; i < length; i++)
        found += !text[i];
    char **words = calloc((size_t)found + 1, sizeof *words);
    if (!words || found <= FIRST)
        _exit(1);
    for (int i = 0; i < found; i++, text += strlen(text) + 1)
        words[i] = text;
    if (chdir(words[DIRECTORY]) || !may_go_on() || !begin(words[RAM], words[STAND_IN], words[PATH]))
        _exit(1);
    close(preload.waits);
    *count = found - FIRST;
    return words + FIRST;
}

/* Returns memory that was touched, which is a free piece of the heap behind its `free`. QEMU has a thread already that gives
 * back what is free there (malloc_trim), so that is done at the last moment. NULL where there is none, or another allocator. */
static void *make_room(size_t room) {
    char *piece = NULL;
#ifdef __GLIBC__
    enum { ROOM_BYTES_MAX = 30 << 20, PAGE = 4096 }; /* glibc maps what is larger than 32 MiB on its own in any case */
    /* As glibc itself sets both once such a piece was given back. */
    if (room && room <= ROOM_BYTES_MAX && mallopt(M_MMAP_THRESHOLD, (int)(room + PAGE)) &&
        mallopt(M_TRIM_THRESHOLD, (int)(2 * room)))
        piece = malloc(room);
    for (size_t at = 0; piece && at < room; at += PAGE)
        ((volatile char *)piece)[at] = 0;
#else
    (void)room;
#endif
    return piece;
}

static main_function real_main;

static int wait_and_run(int count, char **words, char **environment) {
    if (preload.waits < 0)
        return real_main(count, words, environment);
    int given = 0;
    void *room = make_room(preload.room);
    char **told = wait_for_words(&given);
    free(room);
    show_words(words, count, told);
    return real_main(given, told, environ);
}

/* What runs the program's main, once its libraries are loaded. */
__attribute__((visibility("default"))) int __libc_start_main(main_function run, int count, char **words,
                                                             void (*first)(void), void (*last)(void), void (*end)(void),
                                                             void *stack) {
    start_function real = (start_function)dlsym(RTLD_NEXT, "__libc_start_main");
    real_main = run;
    return real(wait_and_run, count, words, first, last, end, stack);
}
