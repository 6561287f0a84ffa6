/* check_nbd.c: the NBD protocol's bytes, and a server over a real volume with several clients at once, without Python,
 * for the sanitizers: tools/check_kernels.sh builds and runs it.
 *
 * Everything that is decoded is handed over in an allocation of exactly its length, so that one byte too many is an
 * error. Writes files in the working directory, and removes them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nbd/internal.h"

#define CHECK(holds)                                                                   \
    do {                                                                               \
        if (!(holds)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #holds); \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

#define SIZE_BYTES (8u << 20)
#define CLIENTS 3
#define ROUNDS 300
#define ASKING 8

/* ---- bytes ---- */

static unsigned char *exactly(const void *bytes, size_t length) {
    unsigned char *copy = malloc(length ? length : 1);
    CHECK(copy);
    memcpy(copy, bytes, length);
    return copy;
}

static void check_info_cut_anywhere(void) {
    const unsigned char data[] = {0, 0, 0, 3, 'w', 'e', 'b', 0, 2, 0, 1, 0, 3};
    for (uint32_t length = 0; length <= sizeof data; length++) {
        struct onion_nbd_info_query query;
        unsigned char *cut = exactly(data, length);
        CHECK((onion_nbd_info_decode(cut, length, &query) == 0) == (length == sizeof data));
        if (length == sizeof data) {
            CHECK(query.name.length == 3 && !memcmp(query.name.bytes, "web", 3));
            CHECK(onion_nbd_info_asked(&query, 1) && onion_nbd_info_asked(&query, 3) &&
                  !onion_nbd_info_asked(&query, 2));
        }
        free(cut);
    }
}

static void check_meta_cut_anywhere(void) {
    const unsigned char data[] = {0, 0, 0, 1, 'w', 0, 0, 0, 2, 0, 0, 0, 2, 'a', ':', 0, 0, 0, 0};
    for (uint32_t length = 0; length <= sizeof data; length++) {
        struct onion_nbd_meta_query query;
        struct onion_nbd_string string;
        unsigned char *cut = exactly(data, length);
        CHECK((onion_nbd_meta_decode(cut, length, &query) == 0) == (length == sizeof data));
        if (length == sizeof data) {
            CHECK(onion_nbd_meta_next(&query, &string) && string.length == 2);
            CHECK(onion_nbd_meta_next(&query, &string) && string.length == 0);
            CHECK(!onion_nbd_meta_next(&query, &string));
        }
        free(cut);
    }
}

static void check_requests(void) {
    struct onion_nbd_limits limits = {
        .size_bytes = 10000, .request_bytes_max = 65536, .structured = 1, .context_count = 1};
    struct onion_nbd_request read = {.type = ONION_NBD_CMD_READ, .offset = 9000, .length = 1000};
    CHECK(onion_nbd_request_check(&read, &limits) == 0);
    read.length++;
    CHECK(onion_nbd_request_check(&read, &limits) == ONION_NBD_EINVAL);
    read.offset = UINT64_MAX;
    CHECK(onion_nbd_request_check(&read, &limits) == ONION_NBD_EINVAL);
    struct onion_nbd_request write = {.type = ONION_NBD_CMD_WRITE, .offset = 10000, .length = 1};
    CHECK(onion_nbd_request_check(&write, &limits) == ONION_NBD_ENOSPC);
    limits.read_only = 1;
    CHECK(onion_nbd_request_check(&write, &limits) == ONION_NBD_EPERM);
    CHECK(onion_nbd_error(-EDQUOT) == ONION_NBD_ENOSPC && onion_nbd_error(ONION_E_POISONED) == ONION_NBD_EIO);
}

/* ---- a server ---- */

static struct onion_volume *open_volume(void) {
    struct onion_volume *volume;
    static const unsigned char own[1][ONION_UUID_BYTES] = {"own-own-own-own"};
    struct onion_head_source source = {.map_path = "nbd-layers/head.map", .own = own, .own_count = 1};
    mkdir("nbd-segments", 0700);
    mkdir("nbd-layers", 0700);
    memcpy(source.map_id, "map-map-map-map", ONION_UUID_BYTES);
    memcpy(source.spare, "spare-spare-spa", ONION_UUID_BYTES);
    CHECK(onion_volume_new(4096, SIZE_BYTES, "nbd-segments", "nbd-layers", 0, 1, &volume) == 0);
    CHECK(onion_volume_open_head(volume, &source) == 0);
    return volume;
}

static void remove_files(void) { CHECK(system("rm -rf nbd-segments nbd-layers") == 0); }

static void put(int fd, const void *bytes, size_t length) {
    CHECK(send(fd, bytes, length, MSG_NOSIGNAL) == (ssize_t)length);
}

static void get(int fd, void *bytes, size_t length) { CHECK(recv(fd, bytes, length, MSG_WAITALL) == (ssize_t)length); }

static int connect_to(struct onion_nbd_server *server) {
    unsigned char bytes[64];
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(onion_nbd_serve(server, pair[1], "check", 0, 0) > 0);
    get(pair[0], bytes, ONION_NBD_GREETING_BYTES);
    onion_put32(bytes, 3);
    onion_put64(bytes + 4, ONION_NBD_OPTION_MAGIC);
    onion_put32(bytes + 12, ONION_NBD_OPT_EXPORT_NAME);
    onion_put32(bytes + 16, 3);
    memcpy(bytes + 20, "web", 3);
    put(pair[0], bytes, 23);
    get(pair[0], bytes, ONION_NBD_EXPORT_REPLY_BYTES);
    CHECK(onion_get64(bytes) == SIZE_BYTES);
    return pair[0];
}

static void request(int fd, uint16_t flags, uint16_t type, uint64_t offset, uint32_t length) {
    unsigned char bytes[ONION_NBD_REQUEST_BYTES];
    onion_put32(bytes, ONION_NBD_REQUEST_MAGIC);
    onion_put16(bytes + 4, flags);
    onion_put16(bytes + 6, type);
    onion_put64(bytes + 8, offset);
    onion_put64(bytes + 16, offset);
    onion_put32(bytes + 24, length);
    put(fd, bytes, sizeof bytes);
}

static uint32_t answer(int fd) {
    unsigned char bytes[ONION_NBD_SIMPLE_REPLY_BYTES];
    get(fd, bytes, sizeof bytes);
    CHECK(onion_get32(bytes) == ONION_NBD_SIMPLE_REPLY_MAGIC);
    return onion_get32(bytes + 4);
}

struct client {
    struct onion_nbd_server *server;
    uint32_t number;
};

/* Each client has every CLIENTS-th block for itself, and finds in it what it wrote last. */
static void *use(void *argument) {
    const struct client *client = argument;
    unsigned char block[4096], back[4096];
    int fd = connect_to(client->server);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint64_t offset = (uint64_t)(round * 7 % 400 * CLIENTS + client->number) * 4096;
        int zero = round % 5 == 4;
        memset(block, zero ? 0 : (int)(round % 255 + 1), sizeof block);
        request(fd, round % 16 == 0 ? ONION_NBD_FLAG_FUA : 0, zero ? ONION_NBD_CMD_TRIM : ONION_NBD_CMD_WRITE, offset,
                4096);
        if (!zero)
            put(fd, block, sizeof block);
        CHECK(answer(fd) == 0);
        request(fd, 0, ONION_NBD_CMD_READ, offset, 4096);
        CHECK(answer(fd) == 0);
        get(fd, back, sizeof back);
        CHECK(!memcmp(block, back, sizeof block));
    }
    request(fd, 0, ONION_NBD_CMD_READ, SIZE_BYTES, 1);
    CHECK(answer(fd) == ONION_NBD_EINVAL);
    close(fd);
    return NULL;
}

static void check_clients_side_by_side(void) {
    struct onion_nbd_options options = {
        .connections_max = 8, .request_bytes_max = 1 << 20, .bytes_in_flight_max = 1 << 20, .kept_ms = 1000};
    struct onion_nbd_server *server;
    struct client clients[CLIENTS];
    pthread_t threads[CLIENTS];
    struct onion_nbd_counters counters;
    struct onion_volume *volume = open_volume();
    CHECK(onion_nbd_new(&options, &server) == 0);
    CHECK(onion_nbd_add_export(server, "web", volume, 0, "") == 0);
    CHECK(onion_nbd_add_export(server, "web", volume, 0, "") == -EEXIST);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){server, i};
        CHECK(pthread_create(&threads[i], NULL, use, &clients[i]) == 0);
    }
    for (int i = 0; i < 50; i++) { /* the volume is taken and given back under them */
        CHECK(onion_nbd_replace_volume(server, "web", volume) == 0);
        CHECK(onion_nbd_hold(server, "web") == 0 && onion_nbd_release(server, "web") == 0);
        CHECK(onion_nbd_connections(server, NULL, 0) <= CLIENTS);
    }
    for (uint32_t i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    CHECK(onion_nbd_stop(server, 5000) == 0);
    onion_nbd_count(server, &counters);
    CHECK(counters.requests[ONION_NBD_CMD_READ] == CLIENTS * (ROUNDS + 1) && counters.errors == CLIENTS);
    onion_nbd_free(server);
    onion_volume_close(volume);
    onion_volume_free(volume);
    remove_files();
}

static void *come_and_go(void *argument) {
    struct onion_nbd_server *server = argument;
    unsigned char bytes[64];
    for (int i = 0; i < ROUNDS; i++) {
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        int64_t id = onion_nbd_serve(server, pair[1], "check", 0, 0);
        CHECK(id > 0 || id == -ESHUTDOWN);
        ssize_t got = recv(pair[0], bytes, ONION_NBD_GREETING_BYTES, MSG_WAITALL);
        CHECK(id > 0 ? got >= 0 || errno == ECONNRESET : got == 0);
        close(pair[0]);
    }
    return NULL;
}

/* Threads wait for so short a time that they often end just as they would be given a client; and the server is stopped
 * and freed while they wait, end, and are given some. */
static void check_threads_that_are_kept(void) {
    struct onion_nbd_options options = {
        .connections_max = 64, .request_bytes_max = 1 << 20, .bytes_in_flight_max = 1 << 20};
    for (uint32_t i = 0; i < 8; i++) {
        struct onion_nbd_server *server;
        pthread_t threads[CLIENTS];
        options.kept_ms = i % 4;
        CHECK(onion_nbd_new(&options, &server) == 0);
        for (int at = 0; at < CLIENTS; at++)
            CHECK(pthread_create(&threads[at], NULL, come_and_go, server) == 0);
        if (i / 2 % 2)
            onion_nbd_begin_threads(server, i); /* also as it is stopped */
        while (i % 2 && onion_nbd_connections(server, NULL, 0) < 2)
            sched_yield();
        if (i % 2)
            CHECK(onion_nbd_stop(server, i % 3) == 0);
        for (int at = 0; at < CLIENTS; at++)
            pthread_join(threads[at], NULL);
        onion_nbd_free(server);
    }
}

/* Tells all who wait that what they want was found. */
static void tell_all(struct onion_nbd_server *server) {
    const char *names[2 * ASKING];
    uint64_t until;
    size_t count = 0;
    char *asked;
    int64_t bytes = onion_nbd_asked(server, &asked, &until);
    CHECK(bytes >= 0);
    for (int64_t at = 0; at < bytes; at += (int64_t)strlen(asked + at) + 1)
        names[count++] = asked + at;
    onion_nbd_found(server, names, count, until);
    free(asked);
}

static int find_for_all(void *context, const char *name, uint32_t length) {
    CHECK(length == 8 && !memcmp(name, "export-", 7));
    if (name[7] == '0')
        tell_all(*(struct onion_nbd_server **)context);
    return 1;
}

static void *ask(void *argument) {
    const struct client *client = argument;
    char text[] = "export-0";
    text[7] = (char)('0' + client->number % 3);
    struct onion_nbd_string name = {text, (uint32_t)strlen(text)};
    CHECK(onion_nbd_ask(client->server, &name) == 1);
    return NULL;
}

/* They get the turn, are told that their exports were found, also by somebody who has no turn, and give up waiting, all at
 * the same moments. Where they do not give up, a turn that got lost would be waited for without an end. */
static void check_turns(void) {
    struct onion_nbd_server *server;
    struct onion_nbd_options options = {.connections_max = 64,
                                        .request_bytes_max = 1 << 20,
                                        .bytes_in_flight_max = 1 << 20,
                                        .hooks = {.find_export = find_for_all, .context = &server}};
    for (uint32_t i = 0; i < 2 * ROUNDS; i++) {
        struct client clients[ASKING];
        pthread_t threads[ASKING];
        options.turn_ms = i % 4 ? 1000000000 : i / 4 % 2;
        CHECK(onion_nbd_new(&options, &server) == 0);
        for (uint32_t at = 0; at < ASKING; at++) {
            clients[at] = (struct client){server, at};
            CHECK(pthread_create(&threads[at], NULL, ask, &clients[at]) == 0);
        }
        for (uint32_t at = 0; at < i % 5; at++)
            tell_all(server);
        for (int at = 0; at < ASKING; at++)
            pthread_join(threads[at], NULL);
        onion_nbd_free(server);
    }
}

static uint32_t asking_in(struct onion_nbd_server *server) {
    char *asked;
    uint64_t until, count = 0;
    int64_t bytes = onion_nbd_asked(server, &asked, &until);
    for (int64_t at = 0; at < bytes; at++)
        count += !asked[at];
    free(asked);
    return (uint32_t)count;
}

/* The turn was passed to the first one that waits, which has not looked yet when it is told that its export was found. So it
 * does not take the turn, and the next one has to get it. */
static void check_turn_of_one_that_is_found(void) {
    struct onion_nbd_server *server;
    struct onion_nbd_options options = {.connections_max = 64,
                                        .request_bytes_max = 1 << 20,
                                        .bytes_in_flight_max = 1 << 20,
                                        .turn_ms = 1000000000,
                                        .hooks = {.find_export = find_for_all, .context = &server}};
    struct client clients[2];
    pthread_t threads[2];
    const char *name = "export-1";
    CHECK(onion_nbd_new(&options, &server) == 0);
    server->is_asked = 1;
    for (uint32_t at = 0; at < 2; at++) {
        clients[at] = (struct client){server, at + 1};
        CHECK(pthread_create(&threads[at], NULL, ask, &clients[at]) == 0);
        while (asking_in(server) <= at)
            sched_yield();
    }
    pthread_mutex_lock(&server->lock);
    server->is_asked = 0;
    pthread_mutex_unlock(&server->lock);
    onion_nbd_found(server, &name, 1, UINT64_MAX);
    for (int at = 0; at < 2; at++)
        pthread_join(threads[at], NULL);
    onion_nbd_free(server);
}

struct waiting_replacement {
    struct onion_nbd_server *server;
    struct onion_volume *volume;
};

static void *replace(void *argument) {
    const struct waiting_replacement *waiting = argument;
    CHECK(onion_nbd_replace_volume(waiting->server, "web", waiting->volume) == 0);
    return NULL;
}

static void *stop(void *argument) {
    const struct waiting_replacement *waiting = argument;
    CHECK(onion_nbd_stop(waiting->server, 0) == 0);
    return NULL;
}

static void wait_until(struct onion_nbd_export *export, int (*holds)(const struct onion_nbd_export *)) {
    for (int is_so = 0; !is_so; sched_yield()) {
        pthread_mutex_lock(&export->lock);
        is_so = holds(export);
        pthread_mutex_unlock(&export->lock);
    }
}

static int is_held(const struct onion_nbd_export *export) { return export->holds == 1; }
static int is_taken_away(const struct onion_nbd_export *export) { return !export->volume; }

/* A stop ends all holds. A replacement that is waiting for a request then has no hold left to release. */
static void check_stop_while_a_replacement_waits(void) {
    struct onion_nbd_options options = {
        .connections_max = 1, .request_bytes_max = 1 << 20, .bytes_in_flight_max = 1 << 20};
    struct waiting_replacement waiting = {.volume = open_volume()};
    pthread_t replacing, stopping;
    uint64_t generation;
    CHECK(onion_nbd_new(&options, &waiting.server) == 0);
    CHECK(onion_nbd_add_export(waiting.server, "web", waiting.volume, 0, "") == 0);
    struct onion_nbd_export *export = onion_nbd_find(waiting.server, "web", 3);
    CHECK(export && onion_nbd_enter(export, &generation) == waiting.volume);
    CHECK(pthread_create(&replacing, NULL, replace, &waiting) == 0);
    wait_until(export, is_held);
    CHECK(pthread_create(&stopping, NULL, stop, &waiting) == 0);
    wait_until(export, is_taken_away);
    onion_nbd_leave(export);
    pthread_join(replacing, NULL);
    pthread_join(stopping, NULL);
    CHECK(export->holds == 0);
    onion_nbd_unref(waiting.server, export);
    onion_nbd_free(waiting.server);
    onion_volume_close(waiting.volume);
    onion_volume_free(waiting.volume);
    remove_files();
}

int main(void) {
    remove_files();
    check_info_cut_anywhere();
    check_meta_cut_anywhere();
    check_requests();
    check_clients_side_by_side();
    check_threads_that_are_kept();
    check_turns();
    check_turn_of_one_that_is_found();
    check_stop_while_a_replacement_waits();
    puts("nbd: all holds");
    return 0;
}
