/* questions.h: clients that name unknown exports wait here for one thread, which answers them one after the other.
 *
 * An answer takes the interpreter. A hundred connections that all went for it would hand it to each other at every call of
 * the kernel, and on a busy host each of these would wait for a processor. Who waits here needs no interpreter.
 *
 * What must hold: a question is answered once, by the thread that answers or, where that has answered nothing for
 * ONION_NBD_TURN_MS or has ended, by the thread that asked. So a volume whose opening hangs keeps no other client out. */
#ifndef ONION_NBD_QUESTIONS_H
#define ONION_NBD_QUESTIONS_H

#include <pthread.h>
#include <stdint.h>

enum { ONION_NBD_TURN_MS = 200 };

struct onion_nbd_question;

struct onion_nbd_questions {
    pthread_mutex_t lock;
    pthread_cond_t asked;
    struct onion_nbd_question *first, **last; /* those that nobody has taken up */
    uint64_t taken;                           /* how many were taken up */
    int answering;                            /* how many threads answer */
    int ended;
};

/* The answer to a question about a name. */
typedef int onion_nbd_answer(void *context, const char *name, uint32_t length);

void onion_nbd_questions_init(struct onion_nbd_questions *questions);
void onion_nbd_questions_destroy(struct onion_nbd_questions *questions);
/* Waits until the question is answered, and returns 1; or 0 where the caller has to find the answer. */
int onion_nbd_ask(struct onion_nbd_questions *questions, const char *name, uint32_t length, int *answer);
/* Answers questions in the calling thread, until they are ended. */
void onion_nbd_answer_all(struct onion_nbd_questions *questions, onion_nbd_answer *answer, void *context);
/* Has no more questions answered. Who waits for one that was not taken up finds the answer. Idempotent. */
void onion_nbd_questions_end(struct onion_nbd_questions *questions);

#endif
