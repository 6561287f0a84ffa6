/* worker.c: the helper, a second thread of a connection that runs slow requests, so that later reads and writes do not
 * wait for them. The first slow request starts the thread.
 *
 * The helper takes all waiting jobs together. First it makes their changes. Then one flush covers the jobs that must be
 * durable (FLUSH itself, and FUA). Then it answers all of them at once. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nbd/internal.h"

#define ZEROS_BYTES (1u << 20)

static unsigned char zeros[ZEROS_BYTES]; /* never written */

/* ---- the verbs ---- */

/* Writes zeros as data, for a client that wants them to be allocated. */
static int write_zeros(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    int status = 0;
    while (length && status == 0) {
        uint64_t part = length < ZEROS_BYTES ? length : ZEROS_BYTES;
        status = onion_volume_write(volume, offset, part, zeros);
        offset += part, length -= part;
    }
    return status;
}

uint32_t onion_nbd_run_zero(struct onion_volume *volume, const struct onion_nbd_request *request) {
    int written = request->type == ONION_NBD_CMD_WRITE_ZEROES && request->flags & ONION_NBD_FLAG_NO_HOLE;
    return onion_nbd_error(written ? write_zeros(volume, request->offset, request->length)
                                   : onion_volume_zero(volume, request->offset, request->length));
}

/* Asks the system to read the pages of a range into memory. This is a hint, so a refusal is no error. */
static int cache(struct onion_volume *volume, uint64_t offset, uint64_t length) {
    struct onion_piece pieces[64];
    while (length) {
        struct onion_ticket ticket;
        uint64_t planned;
        int status = onion_volume_plan_begin(volume, &ticket);
        if (status < 0)
            return status;
        int64_t count = onion_volume_plan(volume, offset, length, pieces, 64, &planned);
        for (int64_t i = 0; i < count; i++) {
            uintptr_t start = (uintptr_t)pieces[i].address & ~(uintptr_t)4095;
            if (pieces[i].address)
                madvise((void *)start, (uintptr_t)pieces[i].address + pieces[i].length - start, MADV_WILLNEED);
        }
        onion_volume_plan_end(volume, ticket);
        if (count < 0)
            return (int)count;
        offset += planned, length -= planned;
    }
    return 0;
}

static uint32_t run_job(struct onion_nbd_connection *connection, struct onion_volume *volume,
                        struct onion_nbd_job *job) {
    const struct onion_nbd_request *request = &job->request;
    int changes = request->type == ONION_NBD_CMD_WRITE || request->type == ONION_NBD_CMD_TRIM ||
                  request->type == ONION_NBD_CMD_WRITE_ZEROES;
    job->flush_wanted = request->type == ONION_NBD_CMD_FLUSH || (changes && request->flags & ONION_NBD_FLAG_FUA);
    switch (request->type) {
    case ONION_NBD_CMD_WRITE:
        return onion_nbd_error(onion_volume_write(volume, request->offset, request->length, job->payload));
    case ONION_NBD_CMD_TRIM:
    case ONION_NBD_CMD_WRITE_ZEROES:
        return onion_nbd_run_zero(volume, request);
    case ONION_NBD_CMD_CACHE:
        return onion_nbd_error(cache(volume, request->offset, request->length));
    case ONION_NBD_CMD_BLOCK_STATUS:
        return onion_nbd_error(
            onion_nbd_block_status(volume, &connection->session, request, &job->reply, &job->reply_length));
    default:
        return 0;
    }
}

/* ---- many jobs ---- */

static void run_jobs(struct onion_nbd_connection *connection, struct onion_nbd_job *jobs, uint32_t count) {
    struct onion_nbd_export *export = connection->session.chosen;
    uint64_t generation;
    struct onion_volume *volume = onion_nbd_enter(export, &generation);
    int flush_wanted = 0;
    for (uint32_t i = 0; i < count; i++) {
        jobs[i].error = volume ? run_job(connection, volume, &jobs[i]) : ONION_NBD_ESHUTDOWN;
        flush_wanted |= !jobs[i].error && jobs[i].flush_wanted;
    }
    if (volume)
        onion_nbd_leave(export);
    uint32_t flushed = flush_wanted ? onion_nbd_error(onion_nbd_flush(connection->server, export)) : 0;
    for (uint32_t i = 0; i < count; i++)
        if (!jobs[i].error && jobs[i].flush_wanted)
            jobs[i].error = flushed;
    if (flushed)
        onion_nbd_event(connection->server, "%s: flush failed with error %u", connection->peer, flushed);
}

/* Sends replies that have only a status together, and each longer reply by itself. The connection's other thread
 * notices a failed send. */
static void answer_jobs(struct onion_nbd_connection *connection, struct onion_nbd_job *jobs, uint32_t count) {
    unsigned char bytes[ONION_NBD_QUEUE_MAX * 32];
    size_t used = 0;
    pthread_mutex_lock(&connection->send_lock);
    for (uint32_t i = 0; i < count; i++) {
        if (jobs[i].error)
            onion_nbd_counter_add(&connection->counters.errors, 1);
        if (jobs[i].reply && !jobs[i].error)
            onion_nbd_send_all(connection, jobs[i].reply, jobs[i].reply_length);
        else
            used += onion_nbd_encode_status(&connection->session, jobs[i].request.cookie, jobs[i].error, bytes + used);
    }
    onion_nbd_send_all(connection, bytes, used);
    pthread_mutex_unlock(&connection->send_lock);
    int64_t now_ns = onion_nbd_now_ns();
    for (uint32_t i = 0; i < count; i++)
        onion_nbd_counter_add(&connection->counters.latency_ns[jobs[i].request.type],
                              (uint64_t)(now_ns - jobs[i].received_ns));
}

/* Waits for jobs and takes all that are queued. 0: there will be no more. */
static uint32_t take_jobs(struct onion_nbd_helper *helper, struct onion_nbd_job *jobs) {
    pthread_mutex_lock(&helper->lock);
    while (!helper->count && !helper->ending)
        pthread_cond_wait(&helper->changed, &helper->lock);
    uint32_t count = helper->count;
    for (uint32_t i = 0; i < count; i++)
        jobs[i] = helper->queue[(helper->head + i) % ONION_NBD_QUEUE_MAX];
    helper->head = (helper->head + count) % ONION_NBD_QUEUE_MAX;
    helper->count = 0;
    helper->busy = count;
    pthread_mutex_unlock(&helper->lock);
    return count;
}

static void finish_jobs(struct onion_nbd_helper *helper, struct onion_nbd_job *jobs, uint32_t count) {
    pthread_mutex_lock(&helper->lock);
    for (uint32_t i = 0; i < count; i++) {
        if (jobs[i].payload)
            helper->bytes -= jobs[i].request.length;
        free(jobs[i].payload);
        free(jobs[i].reply);
    }
    helper->busy = 0;
    pthread_cond_broadcast(&helper->changed);
    pthread_mutex_unlock(&helper->lock);
}

static void *run_helper(void *argument) {
    struct onion_nbd_connection *connection = argument;
    struct onion_nbd_job jobs[ONION_NBD_QUEUE_MAX];
    uint32_t count;
    while ((count = take_jobs(&connection->helper, jobs)) > 0) {
        run_jobs(connection, jobs, count);
        answer_jobs(connection, jobs, count);
        finish_jobs(&connection->helper, jobs, count);
    }
    return NULL;
}

/* ---- for the connection's own thread ---- */

static int is_full(const struct onion_nbd_connection *connection, uint64_t more) {
    const struct onion_nbd_helper *helper = &connection->helper;
    return helper->count == ONION_NBD_QUEUE_MAX ||
           (helper->bytes && helper->bytes + more > connection->server->options.bytes_in_flight_max);
}

/* Starts the helper's thread if it is not running. It inherits the signal mask of the connection's thread, so signals
 * go to the threads of the caller. */
static int start(struct onion_nbd_connection *connection) {
    struct onion_nbd_helper *helper = &connection->helper;
    int status = helper->started ? 0 : -pthread_create(&helper->thread, NULL, run_helper, connection);
    helper->started |= status == 0;
    return status;
}

/* Runs a request that the helper would run, since the system gives no thread for it. Later ones wait. */
static int run_here(struct onion_nbd_connection *connection, const struct onion_nbd_request *request,
                    unsigned char *payload) {
    struct onion_nbd_job job = {.request = *request, .payload = payload, .received_ns = connection->received_ns};
    int status = onion_nbd_send_replies(connection);
    onion_nbd_connection_leave(connection);
    if (status == 0) {
        run_jobs(connection, &job, 1);
        answer_jobs(connection, &job, 1);
    }
    free(job.reply);
    free(payload);
    return status;
}

int onion_nbd_queue(struct onion_nbd_connection *connection, const struct onion_nbd_request *request,
                    unsigned char *payload) {
    struct onion_nbd_helper *helper = &connection->helper;
    uint64_t more = payload ? request->length : 0;
    connection->waiting[request->type]--; /* the helper counts its latency */
    if (start(connection) < 0)
        return run_here(connection, request, payload);
    int status = 0;
    pthread_mutex_lock(&helper->lock);
    if (is_full(connection, more)) {
        pthread_mutex_unlock(&helper->lock);
        status = onion_nbd_send_replies(connection);
        onion_nbd_connection_leave(connection);
        pthread_mutex_lock(&helper->lock);
        while (is_full(connection, more))
            pthread_cond_wait(&helper->changed, &helper->lock);
    }
    if (status == 0) {
        uint32_t at = (helper->head + helper->count++) % ONION_NBD_QUEUE_MAX;
        helper->queue[at] =
            (struct onion_nbd_job){.request = *request, .payload = payload, .received_ns = connection->received_ns};
        helper->bytes += more;
        pthread_cond_broadcast(&helper->changed);
    }
    pthread_mutex_unlock(&helper->lock);
    if (status < 0)
        free(payload);
    return status;
}

int onion_nbd_helper_idle(struct onion_nbd_connection *connection) {
    struct onion_nbd_helper *helper = &connection->helper;
    pthread_mutex_lock(&helper->lock);
    int idle = !helper->count && !helper->busy;
    pthread_mutex_unlock(&helper->lock);
    return idle;
}

void onion_nbd_helper_end(struct onion_nbd_connection *connection) {
    struct onion_nbd_helper *helper = &connection->helper;
    if (!helper->started)
        return;
    pthread_mutex_lock(&helper->lock);
    helper->ending = 1;
    pthread_cond_broadcast(&helper->changed);
    pthread_mutex_unlock(&helper->lock);
    pthread_join(helper->thread, NULL);
}
