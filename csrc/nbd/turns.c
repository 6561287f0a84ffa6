/* turns.c: connections that ask for exports which the server does not have take turns. See server.h.
 *
 * They wait here, and not in the caller's function: whoever has the turn asks the caller, who may open what the others
 * wait for too, and tells them by onion_nbd_found. A connection that was told goes on by itself. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

enum { NOTHING, LOOK_AGAIN, FOUND };

/* A connection that waits, in its own stack. The server's lock guards it, as long as it is in the list. */
struct onion_nbd_asking {
    struct onion_nbd_asking *next;
    const struct onion_nbd_string *name;
    uint64_t number;  /* they are counted in the order in which they asked */
    int is_taken_out; /* its export was found, and it is told so soon */
    uint32_t is_told; /* a word of onion_nbd_await */
};

/* The caller holds the lock, which keeps the connection there. */
static void let_next_go_on(struct onion_nbd_server *server) {
    if (!server->is_asked && server->asking)
        onion_nbd_say(&server->asking->is_told, LOOK_AGAIN);
}

static void take_out(struct onion_nbd_server *server, const struct onion_nbd_asking *own) {
    struct onion_nbd_asking **at = &server->asking;
    while (*at != own)
        at = &(*at)->next;
    *at = own->next;
}

/* Waits until the export was found, or until it is this connection's turn, or for as long as that is waited for. Returns
 * whether it has the turn. `is_found` is set to whether the export was found. */
static int wait_for_turn(struct onion_nbd_server *server, struct onion_nbd_asking *own, int *is_found) {
    struct timespec until = onion_nbd_in_ms(server->options.turn_ms);
    struct onion_nbd_asking **at = &server->asking;
    uint32_t told = LOOK_AGAIN;
    pthread_mutex_lock(&server->lock);
    while (*at)
        at = &(*at)->next;
    *at = own;
    own->number = ++server->askings;
    while (server->is_asked && !own->is_taken_out && told != NOTHING) {
        own->is_told = NOTHING; /* whoever is in the list is told something under the lock alone */
        pthread_mutex_unlock(&server->lock);
        told = onion_nbd_await(&own->is_told, NOTHING, &until);
        *is_found = told == FOUND;
        if (*is_found)
            return 0; /* without the lock, which others want that were found with it */
        pthread_mutex_lock(&server->lock);
    }
    *is_found = own->is_taken_out;
    if (!*is_found)
        take_out(server, own);
    int has_turn = !server->is_asked && !*is_found;
    server->is_asked |= has_turn;
    let_next_go_on(server); /* it may have been told to go on, and been found at the same moment */
    pthread_mutex_unlock(&server->lock);
    /* Who found it is about to say so, and needs it until then. */
    for (told = NOTHING; *is_found && told != FOUND;)
        told = onion_nbd_await(&own->is_told, told, NULL);
    return has_turn;
}

int onion_nbd_ask(struct onion_nbd_server *server, const struct onion_nbd_string *name) {
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    struct onion_nbd_asking own = {.name = name};
    int is_found, has_turn = wait_for_turn(server, &own, &is_found);
    int found = is_found ? 1 : hooks->find_export(hooks->context, name->bytes, name->length);
    if (has_turn) {
        pthread_mutex_lock(&server->lock);
        server->is_asked = 0;
        let_next_go_on(server);
        pthread_mutex_unlock(&server->lock);
    }
    return found;
}

/* Takes those out of the list that asked for a name before a moment, and puts them into another. The caller holds the lock. */
static struct onion_nbd_asking *take_those(struct onion_nbd_server *server, const char *name, uint64_t until,
                                           struct onion_nbd_asking *others) {
    size_t length = strlen(name);
    struct onion_nbd_asking **at = &server->asking;
    while (*at) {
        struct onion_nbd_asking *one = *at;
        if (one->number > until || one->name->length != length || memcmp(one->name->bytes, name, length)) {
            at = &one->next;
            continue;
        }
        *at = one->next;
        one->is_taken_out = 1;
        one->next = others;
        others = one;
    }
    return others;
}

void onion_nbd_found(struct onion_nbd_server *server, const char *const *names, size_t count, uint64_t until) {
    struct onion_nbd_asking *found = NULL;
    pthread_mutex_lock(&server->lock);
    while (count) /* the last one first, so that they are told in order */
        found = take_those(server, names[--count], until, found);
    let_next_go_on(server); /* one of those may just have been told to look, and does not look any more */
    pthread_mutex_unlock(&server->lock);
    while (found) {
        struct onion_nbd_asking *next = found->next; /* it may have gone as soon as it is told */
        onion_nbd_say(&found->is_told, FOUND);
        found = next;
    }
}

int64_t onion_nbd_asked(struct onion_nbd_server *server, char **out, uint64_t *until) {
    size_t length = 0;
    *out = NULL;
    pthread_mutex_lock(&server->lock);
    *until = server->askings;
    for (struct onion_nbd_asking *at = server->asking; at; at = at->next)
        length += at->name->length + 1;
    char *to = *out = length ? malloc(length) : NULL;
    for (struct onion_nbd_asking *at = to ? server->asking : NULL; at; at = at->next) {
        if (memchr(at->name->bytes, 0, at->name->length))
            continue; /* nothing is called so */
        memcpy(to, at->name->bytes, at->name->length);
        to += at->name->length;
        *to++ = 0;
    }
    pthread_mutex_unlock(&server->lock);
    return length && !*out ? -ENOMEM : length ? to - *out : 0;
}
