/* group_cut.c: several volumes cut at one instant, some of them by other processes. See volume.h for what must hold.
 *
 * Each word that is said to a peer is one of a few fixed texts, so that writers wait for no interpreter: from the first
 * hold to the last release nothing runs but what is here. A gate that is held is released before the call returns,
 * whatever a peer does, and after `hold_ms` at the latest, beside the time that writers inside take. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "base/turns.h"
#include "volume/internal.h"

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Says a word. The socket of a peer that listens has room for it. */
static int tell(int peer, const struct onion_cut_word *word) {
    ssize_t sent;
    do
        sent = send(peer, word->bytes, word->length, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        return errno == EPIPE ? -ECONNRESET : errno == EAGAIN ? -ETIME : -errno;
    return (size_t)sent == word->length ? 0 : -ETIME;
}

/* On an error *failed is the peer, counted behind the volumes here. */
static int tell_all(const struct onion_cut *at, const struct onion_cut_word *word, uint32_t *failed) {
    for (uint32_t i = 0; i < at->peer_count; i++) {
        int status = tell(at->peers[i], word);
        if (status < 0) {
            *failed = at->count + i;
            return status;
        }
    }
    return 0;
}

/* Takes what has come of a word. Returns how much of it there is now. -EPROTO: something else came, and is left. */
static int take(int peer, const struct onion_cut_word *word, uint32_t have) {
    unsigned char got[ONION_CUT_WORD_BYTES_MAX];
    ssize_t length = recv(peer, got, word->length - have, MSG_PEEK | MSG_DONTWAIT);
    if (length == 0)
        return -ECONNRESET;
    if (length < 0)
        return errno == EAGAIN || errno == EINTR ? (int)have : -errno;
    if (memcmp(got, (const unsigned char *)word->bytes + have, (size_t)length))
        return -EPROTO;
    if (recv(peer, got, (size_t)length, MSG_DONTWAIT) != length)
        return -EPROTO;
    return (int)have + (int)length;
}

/* Waits for a word. -ETIME: it did not come in time; -ECONNRESET: the peer is gone. */
static int hear(int peer, const struct onion_cut_word *word, int64_t until_ms) {
    int have = 0;
    for (;;) {
        have = take(peer, word, (uint32_t)have);
        if (have < 0)
            return have;
        if ((uint32_t)have == word->length)
            return 0;
        int64_t left = until_ms - now_ms();
        if (left <= 0)
            return -ETIME;
        struct pollfd arrives = {.fd = peer, .events = POLLIN};
        if (poll(&arrives, 1, (int)left) < 0 && errno != EINTR)
            return -errno;
    }
}

static int hear_all(const struct onion_cut *at, const struct onion_cut_word *word, uint32_t *failed) {
    int64_t until_ms = now_ms() + at->words.hold_ms;
    for (uint32_t i = 0; i < at->peer_count; i++) {
        int status = hear(at->peers[i], word, until_ms);
        if (status < 0) {
            *failed = at->count + i;
            return status;
        }
    }
    return 0;
}

static int words_fit(const struct onion_cut_words *words) {
    return words->hold.length <= ONION_CUT_WORD_BYTES_MAX && words->held.length <= ONION_CUT_WORD_BYTES_MAX &&
           words->cut.length <= ONION_CUT_WORD_BYTES_MAX && words->done.length <= ONION_CUT_WORD_BYTES_MAX;
}

/* Holds the volumes here, which the caller releases, whatever is returned. On an error *failed is one of them. */
static int hold_here(const struct onion_cut *at, uint32_t *held, uint32_t *failed) {
    for (; *held < at->count; ++*held) {
        int status = onion_volume_seal_hold(at->volumes[*held]);
        if (status < 0) {
            *failed = *held;
            return status;
        }
    }
    return 0;
}

static int cut_here(const struct onion_cut *at, uint32_t *failed) {
    for (uint32_t i = 0; i < at->count; i++) {
        int status = onion_volume_seal_cut(at->volumes[i]);
        if (status < 0) {
            *failed = i;
            return status;
        }
    }
    return 0;
}

static void release_here(const struct onion_cut *at, uint32_t held) {
    for (uint32_t i = 0; i < held; i++)
        onion_volume_seal_release(at->volumes[i]);
}

/* Where one peer has all volumes, nobody else is to be held before it cuts. It has both words at once, so its writers wait
 * for nobody, however late this thread gets a processor. */
static int tell_the_only_one(const struct onion_cut *at, uint32_t *failed) {
    const struct onion_cut_word *hold = &at->words.hold, *cut = &at->words.cut;
    unsigned char both[2 * ONION_CUT_WORD_BYTES_MAX];
    memcpy(both, hold->bytes, hold->length);
    memcpy(both + hold->length, cut->bytes, cut->length);
    struct onion_cut_word word = {.bytes = both, .length = hold->length + cut->length};
    int status = tell_all(at, &word, failed);
    return status < 0 ? status : hear_all(at, &at->words.held, failed);
}

static int lead(const struct onion_cut *at, uint32_t *failed) {
    uint32_t held = 0;
    if (!at->count && at->peer_count == 1) {
        int told = tell_the_only_one(at, failed);
        return told < 0 ? told : hear_all(at, &at->words.done, failed);
    }
    int status = tell_all(at, &at->words.hold, failed);
    if (status == 0)
        status = hold_here(at, &held, failed);
    if (status == 0)
        status = hear_all(at, &at->words.held, failed);
    if (status == 0)
        status = tell_all(at, &at->words.cut, failed);
    if (status == 0)
        status = cut_here(at, failed);
    release_here(at, held);
    return status < 0 ? status : hear_all(at, &at->words.done, failed);
}

int onion_volumes_cut(const struct onion_cut *at, uint32_t *failed) {
    *failed = UINT32_MAX;
    if (!words_fit(&at->words))
        return -EINVAL;
    uint64_t turns = onion_turns_take_short(); /* all writers wait for this thread */
    int status = lead(at, failed);
    onion_turns_end(turns);
    return status;
}

static int follow(const struct onion_cut *at, int wait_ms, uint32_t *failed) {
    uint32_t held = 0;
    int peer = at->peers[0], status = hear(peer, &at->words.hold, now_ms() + wait_ms);
    if (status == 0)
        status = hold_here(at, &held, failed);
    if (status == 0)
        status = tell(peer, &at->words.held);
    if (status == 0)
        status = hear(peer, &at->words.cut, now_ms() + at->words.hold_ms);
    if (status == 0)
        status = cut_here(at, failed);
    release_here(at, held);
    return status < 0 ? status : tell(peer, &at->words.done);
}

int onion_volumes_cut_when_told(const struct onion_cut *at, int wait_ms, uint32_t *failed) {
    *failed = at->count;
    if (!words_fit(&at->words) || at->peer_count != 1)
        return -EINVAL;
    uint64_t turns = onion_turns_take_short();
    int status = follow(at, wait_ms, failed);
    onion_turns_end(turns);
    return status;
}
