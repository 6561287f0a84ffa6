/* A client of NBD that reads the first 4 KiB of many exports at once, in one thread that waits for all of them (epoll).
 *
 *     nbd_first_reads SOCKET BLOCK < names
 *
 * Each line of the input names exports, separated by spaces. All are connected to at once; then, one export a line, the
 * seconds are printed (CLOCK_MONOTONIC) at which its block was there, and an empty line. So the server is measured, and
 * not a hundred threads of Python that share two processors with it. What an export answers must be what the file BLOCK
 * holds, and nothing may be wrong in an answer: otherwise the program says what, and ends with 1. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { EXPORTS_MAX = 4096, NAME_BYTES_MAX = 400, BLOCK = 4096 };
enum { GREETING = 18, REPLY = 20, READ_REPLY = 16, GO = 7, ACK = 1, INFO = 3 };
enum state { GREETED, CHOOSING, READING, DONE };

struct client {
    int fd;
    enum state state;
    const char *name;
    size_t have;
    double ended;
    unsigned char in[2 * BLOCK];
};

static struct client clients[EXPORTS_MAX];
static unsigned char expected[BLOCK];

static void fail(const char *what, const char *name) {
    fprintf(stderr, "%s: %s\n", name, what);
    exit(1);
}

static uint32_t number(const unsigned char *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return be32toh(value);
}

static void put(unsigned char *at, uint32_t value) {
    value = htobe32(value);
    memcpy(at, &value, 4);
}

static void say(struct client *client, const unsigned char *bytes, size_t length) {
    if (send(client->fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length)
        fail("the server takes nothing", client->name);
}

static void eat(struct client *client, size_t length) {
    client->have -= length;
    memmove(client->in, client->in + length, client->have);
}

static void ask_for_export(struct client *client) {
    unsigned char option[512] = {0};
    uint32_t length = (uint32_t)strlen(client->name);

    put(option, 3);
    memcpy(option + 4, "IHAVEOPT", 8);
    put(option + 12, GO);
    put(option + 16, 4 + length + 2);
    put(option + 20, length);
    memcpy(option + 24, client->name, length);
    say(client, option, 24 + length + 2);
}

static void ask(struct client *client, unsigned char verb) {
    unsigned char request[28] = {0};

    put(request, 0x25609513);
    request[7] = verb; /* 0: read, 2: disconnect */
    request[15] = 1;   /* the cookie, of which the reply has to bear the same */
    put(request + 24, verb ? 0 : BLOCK);
    say(client, request, sizeof(request));
}

/* Takes one message if all of it is there. Returns whether it was. */
static int step(struct client *client) {
    struct timespec now;

    if (client->state == GREETED && client->have >= GREETING) {
        if (memcmp(client->in, "NBDMAGICIHAVEOPT", 16))
            fail("no NBD server is there", client->name);
        eat(client, GREETING);
        ask_for_export(client);
        client->state = CHOOSING;
        return 1;
    }
    if (client->state == CHOOSING && client->have >= REPLY && client->have >= REPLY + number(client->in + 16)) {
        uint32_t kind = number(client->in + 12);

        if (memcmp(client->in, "\x00\x03\xe8\x89\x04\x55\x65\xa9", 8) || (kind != ACK && kind != INFO))
            fail("the server refused it", client->name);
        eat(client, REPLY + number(client->in + 16));
        if (kind == ACK) {
            ask(client, 0);
            client->state = READING;
        }
        return 1;
    }
    if (client->state == READING && client->have >= READ_REPLY)
        if (number(client->in) != 0x67446698 || number(client->in + 4) || number(client->in + 12) != 1)
            fail("its first block could not be read", client->name);
    if (client->state == READING && client->have >= READ_REPLY + BLOCK) {
        if (client->have > READ_REPLY + BLOCK || memcmp(client->in + READ_REPLY, expected, BLOCK))
            fail("its first block is another one", client->name);
        clock_gettime(CLOCK_MONOTONIC, &now);
        client->ended = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
        client->state = DONE;
    }
    return 0;
}

static void connect_all(const char *path, int count, int epoll) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &clients[i]};

        clients[i].fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (clients[i].fd < 0 || connect(clients[i].fd, (struct sockaddr *)&address, sizeof(address)))
            fail(strerror(errno), path);
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].fd, &event))
            fail(strerror(errno), "epoll");
    }
}

static void hear(struct client *client) {
    ssize_t got = recv(client->fd, client->in + client->have, sizeof(client->in) - client->have, MSG_DONTWAIT);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0)
        fail("the server hung up", client->name);
    client->have += (size_t)got;
    while (step(client))
        ;
    if (client->state == DONE) {
        ask(client, 2);
        close(client->fd);
    }
}

static void read_all(const char *path, int count) {
    struct epoll_event events[64];
    int epoll = epoll_create1(EPOLL_CLOEXEC), left = count;

    connect_all(path, count, epoll);
    while (left) {
        int found = epoll_wait(epoll, events, 64, 60000);

        if (found == 0 || (found < 0 && errno != EINTR))
            fail("the server says nothing", path);
        for (int i = 0; i < found; i++) {
            struct client *client = events[i].data.ptr;

            hear(client);
            left -= client->state == DONE;
        }
    }
    close(epoll);
    for (int i = 0; i < count; i++)
        printf("%.9f\n", clients[i].ended);
    printf("\n");
    fflush(stdout);
}

static int read_expected(const char *path) {
    FILE *file = fopen(path, "rb");
    int is_short = !file || fread(expected, 1, BLOCK, file) != BLOCK;

    if (file)
        fclose(file);
    return is_short;
}

int main(int argc, char **argv) {
    char *line = NULL;
    size_t room = 0;

    if (argc != 3 || strlen(argv[1]) >= sizeof(((struct sockaddr_un *)0)->sun_path) || read_expected(argv[2]))
        return 2;
    while (getline(&line, &room, stdin) > 0) {
        int count = 0;

        for (char *name = strtok(line, " \n"); name; name = strtok(NULL, " \n")) {
            if (count == EXPORTS_MAX || strlen(name) > NAME_BYTES_MAX)
                fail("there are too many, or its name is too long", name);
            memset(&clients[count], 0, sizeof(clients[count]));
            clients[count++].name = name;
        }
        read_all(argv[1], count);
    }
    free(line);
    return 0;
}
