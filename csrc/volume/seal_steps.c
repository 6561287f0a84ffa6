/* seal_steps.c: the steps of several seals that wait for the disk, side by side. See volume.h for what must hold.
 *
 * In threads of C: with one of Python for each volume, eight volumes wait for their turns in the interpreter for as long
 * as for the disk. Each thread takes the next volume that nobody has taken, so where no thread can be started the caller
 * does all. */
#include "base/workers.h"
#include "volume/internal.h"

struct job {
    struct onion_seal_step *steps;
    uint32_t count, taken;
    int (*step)(struct onion_seal_step *step);
};

static int begin_one(struct onion_seal_step *step) {
    return onion_volume_seal_begin(step->volume, step->map_path, step->map_id);
}

static int sync_one(struct onion_seal_step *step) { return onion_volume_seal_sync(step->volume, &step->sealed); }

static void *work(void *argument) {
    struct job *job = argument;
    for (;;) {
        uint32_t at = __atomic_fetch_add(&job->taken, 1, __ATOMIC_RELAXED);
        if (at >= job->count)
            return NULL;
        struct onion_seal_step *step = &job->steps[at];
        step->status = job->step(step);
        const struct onion_site *site = onion_site_of(step->status); /* noted for this thread alone */
        if (site)
            step->site = *site;
        else
            step->site.status = 0;
    }
}

static void run(struct onion_seal_step *steps, uint32_t count, int (*step)(struct onion_seal_step *),
                uint32_t threads) {
    struct job job = {.steps = steps, .count = count, .step = step};
    onion_run_workers(work, &job, threads < ONION_WORKERS_MAX ? (int)threads : ONION_WORKERS_MAX);
}

void onion_volumes_seal_begin(struct onion_seal_step *steps, uint32_t count) {
    uint32_t waiting = 1;
    for (uint32_t i = 0; i < count; i++)
        waiting += (uint32_t)onion_volume_seal_would_wait(steps[i].volume);
    run(steps, count, begin_one, waiting < count ? waiting : count);
}

void onion_volumes_seal_sync(struct onion_seal_step *steps, uint32_t count) { run(steps, count, sync_one, count); }
