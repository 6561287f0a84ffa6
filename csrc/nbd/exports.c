/* exports.c: the exports: their names, their volumes, and the requests in flight on them. See server.h for what must
 * hold.
 *
 * An export that is removed leaves the list at once, and is freed with its last reference. The use of its volume is
 * counted separately: each request counts itself as in flight (onion_nbd_enter). A thread that takes the volume away
 * first holds the export, so that no more requests come in, and then waits for those in flight. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

/* ---- exports ---- */

static void free_label(struct onion_nbd_label *label) {
    if (label) {
        free(label->name);
        free(label->description);
        free(label);
    }
}

static struct onion_nbd_label *make_label(const char *name, const char *description) {
    struct onion_nbd_label *label = calloc(1, sizeof *label);
    if (label) {
        label->name = strdup(name);
        label->description = strdup(description);
    }
    if (label && label->name && label->description)
        return label;
    free_label(label);
    return NULL;
}

static void free_export(struct onion_nbd_export *export) {
    while (export->contexts) {
        struct onion_nbd_context *context = export->contexts;
        export->contexts = context->next;
        free(context->name);
        free(context->runs);
        free(context);
    }
    pthread_mutex_destroy(&export->lock);
    pthread_cond_destroy(&export->changed);
    while (export->label) {
        struct onion_nbd_label *label = export->label;
        export->label = label->former;
        free_label(label);
    }
    free(export);
}

static uint32_t key_of(const char *name, size_t length) {
    uint32_t key = 0x811c9dc5;
    for (size_t i = 0; i < length; i++)
        key = (key ^ (unsigned char)name[i]) * 0x01000193;
    return key;
}

static struct onion_nbd_export **bucket_of(struct onion_nbd_server *server, uint32_t key) {
    return &server->buckets[(key ^ key >> 16) % ONION_NBD_BUCKETS];
}

static void put_in_bucket(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    struct onion_nbd_export **bucket = bucket_of(server, export->key);
    export->same = *bucket;
    *bucket = export;
}

static void take_out_of_bucket(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    struct onion_nbd_export **at = bucket_of(server, export->key);
    while (*at != export)
        at = &(*at)->same;
    *at = export->same;
}

struct onion_nbd_export *onion_nbd_named(struct onion_nbd_server *server, const char *name, size_t length) {
    uint32_t key = key_of(name, length);
    struct onion_nbd_export *at = *bucket_of(server, key);
    while (at && (at->key != key || strlen(at->label->name) != length || memcmp(at->label->name, name, length)))
        at = at->same;
    return at;
}

/* At the end of the list, so that LIST shows exports in the order in which they were added. */
static void link_export(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    export->link = server->last;
    *server->last = export;
    server->last = &export->next;
    put_in_bucket(server, export);
}

void onion_nbd_unlink_export(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    *export->link = export->next;
    if (export->next)
        export->next->link = export->link;
    else
        server->last = export->link;
    take_out_of_bucket(server, export);
}

struct onion_nbd_export *onion_nbd_find(struct onion_nbd_server *server, const char *name, uint32_t length) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = onion_nbd_named(server, name, length);
    if (!export && !length && server->default_name)
        export = onion_nbd_named(server, server->default_name, strlen(server->default_name));
    if (export)
        export->references++;
    pthread_mutex_unlock(&server->lock);
    return export;
}

void onion_nbd_unref(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    if (!export)
        return;
    pthread_mutex_lock(&server->lock);
    int last = --export->references == 0;
    pthread_mutex_unlock(&server->lock);
    if (last)
        free_export(export);
}

int onion_nbd_add_export(struct onion_nbd_server *server, const char *name, struct onion_volume *volume,
                         enum onion_nbd_access access, const char *description) {
    if (strlen(name) > ONION_NBD_NAME_MAX || strlen(description) > ONION_NBD_NAME_MAX)
        return -EINVAL;
    struct onion_nbd_export *export = calloc(1, sizeof *export);
    if (!export)
        return -ENOMEM;
    export->references = 1;
    export->label = make_label(name, description);
    export->key = key_of(name, strlen(name));
    export->read_only = access == ONION_NBD_TO_READ;
    export->unwritten = access == ONION_NBD_UNWRITTEN;
    export->volume = volume;
    export->generation = 1;
    export->next_context_id = ONION_NBD_ID_CHANGED;
    pthread_mutex_init(&export->lock, NULL);
    pthread_cond_init(&export->changed, NULL);
    int status = export->label ? 0 : -ENOMEM;
    pthread_mutex_lock(&server->lock);
    if (status == 0)
        status = server->stopping ? -ESHUTDOWN : onion_nbd_named(server, name, strlen(name)) ? -EEXIST : 0;
    if (status == 0)
        link_export(server, export);
    pthread_mutex_unlock(&server->lock);
    if (status < 0)
        free_export(export);
    return status;
}

int onion_nbd_rename_export(struct onion_nbd_server *server, const char *name, const char *new_name,
                            const char *description) {
    if (strlen(new_name) > ONION_NBD_NAME_MAX || strlen(description) > ONION_NBD_NAME_MAX)
        return -EINVAL;
    struct onion_nbd_label *label = make_label(new_name, description);
    char *default_name = strdup(new_name);
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = onion_nbd_named(server, name, strlen(name));
    int status = !label || !default_name ? -ENOMEM : !export ? -ENOENT : 0;
    if (status == 0 && onion_nbd_named(server, new_name, strlen(new_name)))
        status = -EEXIST;
    if (status == 0) {
        take_out_of_bucket(server, export);
        label->former = export->label; /* connections may be reading it */
        __atomic_store_n(&export->label, label, __ATOMIC_RELEASE);
        export->key = key_of(new_name, strlen(new_name));
        put_in_bucket(server, export);
        label = NULL;
    }
    if (status == 0 && server->default_name && !strcmp(server->default_name, name)) {
        char *old = server->default_name;
        server->default_name = default_name;
        default_name = old;
    }
    pthread_mutex_unlock(&server->lock);
    free_label(label);
    free(default_name);
    return status;
}

int onion_nbd_set_default(struct onion_nbd_server *server, const char *name) {
    char *copy = strdup(name);
    if (!copy)
        return -ENOMEM;
    pthread_mutex_lock(&server->lock);
    int status = onion_nbd_named(server, name, strlen(name)) ? 0 : -ENOENT;
    if (status == 0) {
        char *old = server->default_name;
        server->default_name = copy;
        copy = old;
    }
    pthread_mutex_unlock(&server->lock);
    free(copy);
    return status;
}

/* ---- in flight ---- */

struct onion_volume *onion_nbd_enter(struct onion_nbd_export *export, uint64_t *generation) {
    pthread_mutex_lock(&export->lock);
    while (export->holds && export->volume)
        pthread_cond_wait(&export->changed, &export->lock);
    struct onion_volume *volume = export->volume;
    if (volume)
        export->in_flight++;
    *generation = export->generation;
    pthread_mutex_unlock(&export->lock);
    return volume;
}

void onion_nbd_leave(struct onion_nbd_export *export) {
    pthread_mutex_lock(&export->lock);
    if (--export->in_flight == 0 && (export->holds || !export->volume))
        pthread_cond_broadcast(&export->changed);
    pthread_mutex_unlock(&export->lock);
}

static int flush_once(struct onion_nbd_export *export, int *wants_scrub) {
    uint64_t generation;
    struct onion_volume *volume = onion_nbd_enter(export, &generation);
    if (!volume)
        return -ESHUTDOWN;
    int status = onion_volume_flush(volume);
    *wants_scrub = onion_volume_wants_reclaim(volume) || onion_volume_may_want_compact_map(volume);
    onion_nbd_leave(export);
    return status;
}

int onion_nbd_flush(struct onion_nbd_server *server, struct onion_nbd_export *export) {
    const struct onion_nbd_hooks *hooks = &server->options.hooks;
    int wants_scrub = 0;
    /* A write that was answered would have had the head opened. */
    int is_durable = export->read_only || onion_nbd_is_unwritten(export);
    int status = is_durable ? 0 : flush_once(export, &wants_scrub);
    while ((status == -ENOSPC || status == -EDQUOT) && hooks->make_room) {
        const struct onion_nbd_label *label = onion_nbd_label(export);
        int is_durable_now = hooks->make_room(hooks->context, label->name);
        if (onion_nbd_label(export) != label) /* by its name, another export may have been flushed in its place */
            continue;
        status = is_durable_now ? 0 : status;
        break;
    }
    if (wants_scrub && hooks->freed)
        hooks->freed(hooks->context, onion_nbd_label(export)->name);
    return status;
}

/* The caller holds the export's lock. */
static void hold(struct onion_nbd_export *export) {
    export->holds++;
    while (export->in_flight)
        pthread_cond_wait(&export->changed, &export->lock);
}

static void release(struct onion_nbd_export *export) {
    if (export->holds) /* a stop sets it to 0 */
        export->holds--;
    pthread_cond_broadcast(&export->changed);
}

void onion_nbd_take_volume_away(struct onion_nbd_export *export) {
    pthread_mutex_lock(&export->lock);
    export->volume = NULL;
    __atomic_store_n(&export->unwritten, 0, __ATOMIC_RELEASE); /* there is no head to open any more */
    pthread_cond_broadcast(&export->changed);
    while (export->in_flight)
        pthread_cond_wait(&export->changed, &export->lock);
    pthread_mutex_unlock(&export->lock);
}

static struct onion_nbd_export *find_named(struct onion_nbd_server *server, const char *name) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = onion_nbd_named(server, name, strlen(name));
    if (export)
        export->references++;
    pthread_mutex_unlock(&server->lock);
    return export;
}

int onion_nbd_remove_export(struct onion_nbd_server *server, const char *name, int if_unused) {
    pthread_mutex_lock(&server->lock);
    struct onion_nbd_export *export = onion_nbd_named(server, name, strlen(name));
    int status = !export ? -ENOENT : if_unused && export->references > 1 ? -EBUSY : 0; /* one reference is the list's */
    if (status == 0)
        onion_nbd_unlink_export(server, export);
    pthread_mutex_unlock(&server->lock);
    if (status < 0)
        return status;
    onion_nbd_take_volume_away(export);
    onion_nbd_unref(server, export);
    return 0;
}

int onion_nbd_replace_volume(struct onion_nbd_server *server, const char *name, struct onion_volume *volume) {
    struct onion_nbd_export *export = find_named(server, name);
    if (!export)
        return -ENOENT;
    pthread_mutex_lock(&export->lock);
    hold(export);
    if (export->volume)
        export->volume = volume;
    __atomic_store_n(&export->unwritten, 0, __ATOMIC_RELEASE);
    export->generation++;
    for (struct onion_nbd_context *context = export->contexts; context; context = context->next)
        context->all_changed = 1;
    release(export);
    pthread_mutex_unlock(&export->lock);
    onion_nbd_unref(server, export);
    return 0;
}

/* Calls `change` with the export of that name, under its lock. */
static int change_named(struct onion_nbd_server *server, const char *name, void (*change)(struct onion_nbd_export *)) {
    struct onion_nbd_export *export = find_named(server, name);
    if (!export)
        return -ENOENT;
    pthread_mutex_lock(&export->lock);
    change(export);
    pthread_mutex_unlock(&export->lock);
    onion_nbd_unref(server, export);
    return 0;
}

int onion_nbd_hold(struct onion_nbd_server *server, const char *name) { return change_named(server, name, hold); }

int onion_nbd_release(struct onion_nbd_server *server, const char *name) { return change_named(server, name, release); }

/* ---- changed-since contexts ---- */

int64_t onion_nbd_change_mark(struct onion_nbd_server *server, const char *name) {
    struct onion_nbd_export *export = find_named(server, name);
    uint64_t generation;
    struct onion_volume *volume = export ? onion_nbd_enter(export, &generation) : NULL;
    int64_t mark = volume ? (int64_t)onion_volume_birth(volume) : -ENOENT;
    if (volume)
        onion_nbd_leave(export);
    onion_nbd_unref(server, export);
    return mark;
}

static int runs_are_sorted(const uint64_t (*runs)[2], size_t count) {
    for (size_t i = 0; i < count; i++)
        if (runs[i][1] == 0 || runs[i][0] + runs[i][1] < runs[i][0] ||
            (i && runs[i - 1][0] + runs[i - 1][1] > runs[i][0]))
            return 0;
    return 1;
}

/* Finds or makes the context of that name. The caller holds the export's lock. NULL: no memory. */
static struct onion_nbd_context *context_named(struct onion_nbd_export *export, const char *meta) {
    struct onion_nbd_context **at = &export->contexts;
    while (*at && strcmp((*at)->name, meta))
        at = &(*at)->next;
    if (*at)
        return *at;
    struct onion_nbd_context *context = calloc(1, sizeof *context);
    char *name = strdup(meta);
    if (!context || !name) {
        free(context);
        free(name);
        return NULL;
    }
    context->name = name;
    context->id = export->next_context_id++;
    return *at = context;
}

int onion_nbd_set_context(struct onion_nbd_server *server, const char *name, const char *meta,
                          const uint64_t (*runs)[2], size_t run_count, uint64_t mark) {
    if (strlen(meta) > ONION_NBD_NAME_MAX || !runs_are_sorted(runs, run_count))
        return -EINVAL;
    uint64_t(*copy)[2] = malloc((run_count + 1) * sizeof *copy);
    if (!copy)
        return -ENOMEM;
    if (run_count)
        memcpy(copy, runs, run_count * sizeof *copy);
    struct onion_nbd_export *export = find_named(server, name);
    int status = export ? 0 : -ENOENT;
    if (export) {
        pthread_mutex_lock(&export->lock);
        hold(export);
        struct onion_nbd_context *context = context_named(export, meta);
        if (context) {
            uint64_t(*old)[2] = context->runs;
            context->runs = copy;
            context->run_count = run_count;
            context->mark = mark;
            context->all_changed = 0;
            copy = old;
        } else {
            status = -ENOMEM;
        }
        release(export);
        pthread_mutex_unlock(&export->lock);
    }
    free(copy);
    onion_nbd_unref(server, export);
    return status;
}
