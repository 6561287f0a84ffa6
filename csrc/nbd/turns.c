/* turns.c: connections that ask for exports which the server does not have take turns. See server.h.
 *
 * They wait here, and not in the caller's function: whoever has the turn asks the caller, who may open what the others
 * wait for too, and tells them by onion_nbd_found. A connection that was told goes on by itself. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

/* A connection that waits, in its own stack. The server's lock guards it. */
struct onion_nbd_asking {
    struct onion_nbd_asking *next;
    const struct onion_nbd_string *name;
    uint64_t number; /* they are counted in the order in which they asked */
    int is_found;
    pthread_cond_t changed;
};

/* The caller holds the lock. */
static void let_next_go_on(struct onion_nbd_server *server) {
    if (!server->is_asked && server->asking)
        pthread_cond_signal(&server->asking->changed);
}

/* Waits until the export was found, or until it is this connection's turn, or for as long as that is waited for. Returns
 * whether it has the turn. The caller holds the lock. */
static int wait_for_turn(struct onion_nbd_server *server, struct onion_nbd_asking *own) {
    struct timespec until = onion_nbd_in_ms(server->options.turn_ms);
    struct onion_nbd_asking **at = &server->asking;
    while (*at)
        at = &(*at)->next;
    *at = own;
    own->number = ++server->askings;
    while (server->is_asked && !own->is_found &&
           pthread_cond_timedwait(&own->changed, &server->lock, &until) != ETIMEDOUT)
        ;
    for (at = &server->asking; *at != own; at = &(*at)->next)
        ;
    *at = own->next;
    int has_turn = !server->is_asked && !own->is_found;
    server->is_asked |= has_turn;
    let_next_go_on(server); /* it may have been told to go on, and been found at the same moment */
    return has_turn;
}

int onion_nbd_ask(struct onion_nbd_server *server, const struct onion_nbd_string *name) {
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    struct onion_nbd_asking own = {.name = name};
    onion_nbd_init_condition(&own.changed);
    pthread_mutex_lock(&server->lock);
    int has_turn = wait_for_turn(server, &own);
    pthread_mutex_unlock(&server->lock);
    pthread_cond_destroy(&own.changed);
    int found = own.is_found ? 1 : hooks->find_export(hooks->context, name->bytes, name->length);
    if (has_turn) {
        pthread_mutex_lock(&server->lock);
        server->is_asked = 0;
        let_next_go_on(server);
        pthread_mutex_unlock(&server->lock);
    }
    return found;
}

void onion_nbd_found(struct onion_nbd_server *server, const char *name, uint64_t until) {
    size_t length = strlen(name);
    pthread_mutex_lock(&server->lock);
    for (struct onion_nbd_asking *at = server->asking; at; at = at->next)
        if (at->number <= until && at->name->length == length && !memcmp(at->name->bytes, name, length)) {
            at->is_found = 1;
            pthread_cond_signal(&at->changed);
        }
    pthread_mutex_unlock(&server->lock);
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
