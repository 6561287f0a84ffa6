/* questions.c: see questions.h. */
#define _GNU_SOURCE
#include "nbd/questions.h"

#include <errno.h>
#include <stddef.h>
#include <time.h>

/* On the stack of the thread that asks. */
struct onion_nbd_question {
    const char *name;
    uint32_t length;
    int answer;
    enum { WAITS, TAKEN, ANSWERED } state;
    pthread_cond_t changed;
    struct onion_nbd_question *next;
};

static void init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

void onion_nbd_questions_init(struct onion_nbd_questions *questions) {
    *questions = (struct onion_nbd_questions){.last = &questions->first};
    pthread_mutex_init(&questions->lock, NULL);
    pthread_cond_init(&questions->asked, NULL);
}

void onion_nbd_questions_destroy(struct onion_nbd_questions *questions) {
    pthread_mutex_destroy(&questions->lock);
    pthread_cond_destroy(&questions->asked);
}

static void withdraw(struct onion_nbd_questions *questions, struct onion_nbd_question *question) {
    struct onion_nbd_question **at = &questions->first;
    while (*at != question)
        at = &(*at)->next;
    *at = question->next;
    if (!*at)
        questions->last = at;
}

/* Waits until the question is taken up, as long as others are from time to time. The caller holds the lock. */
static void wait_for_turn(struct onion_nbd_questions *questions, struct onion_nbd_question *question) {
    uint64_t taken = questions->taken + 1;
    while (question->state == WAITS && !questions->ended && taken != questions->taken) {
        taken = questions->taken;
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += ONION_NBD_TURN_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        int status = 0;
        while (question->state == WAITS && !questions->ended && status != ETIMEDOUT)
            status = pthread_cond_timedwait(&question->changed, &questions->lock, &until);
    }
}

int onion_nbd_ask(struct onion_nbd_questions *questions, const char *name, uint32_t length, int *answer) {
    struct onion_nbd_question question = {.name = name, .length = length, .state = WAITS};
    pthread_mutex_lock(&questions->lock);
    if (!questions->answering || questions->ended) {
        pthread_mutex_unlock(&questions->lock);
        return 0;
    }
    init_condition(&question.changed);
    *questions->last = &question;
    questions->last = &question.next;
    pthread_cond_signal(&questions->asked);
    wait_for_turn(questions, &question);
    int is_taken = question.state != WAITS;
    if (!is_taken)
        withdraw(questions, &question);
    while (question.state == TAKEN)
        pthread_cond_wait(&question.changed, &questions->lock);
    pthread_mutex_unlock(&questions->lock);
    pthread_cond_destroy(&question.changed);
    *answer = question.answer;
    return is_taken;
}

void onion_nbd_answer_all(struct onion_nbd_questions *questions, onion_nbd_answer *answer, void *context) {
    pthread_mutex_lock(&questions->lock);
    questions->answering++;
    for (;;) {
        while (!questions->first && !questions->ended)
            pthread_cond_wait(&questions->asked, &questions->lock);
        if (questions->ended)
            break;
        struct onion_nbd_question *question = questions->first;
        withdraw(questions, question);
        question->state = TAKEN;
        questions->taken++;
        pthread_mutex_unlock(&questions->lock);
        int found = answer(context, question->name, question->length);
        pthread_mutex_lock(&questions->lock);
        question->answer = found;
        question->state = ANSWERED;
        pthread_cond_signal(&question->changed);
    }
    questions->answering--;
    pthread_mutex_unlock(&questions->lock);
}

void onion_nbd_questions_end(struct onion_nbd_questions *questions) {
    pthread_mutex_lock(&questions->lock);
    questions->ended = 1;
    pthread_cond_broadcast(&questions->asked);
    for (struct onion_nbd_question *at = questions->first; at; at = at->next)
        pthread_cond_signal(&at->changed);
    pthread_mutex_unlock(&questions->lock);
}
