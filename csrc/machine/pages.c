/* pages.c: see pages.h. One body, compiled for every processor and, on x86-64, for those with AVX2 too. */
#include "machine/pages.h"

enum { VECTOR_BYTES = 32, STEP = 4 }; /* vectors that are joined before the result is looked at */

typedef uint64_t vector __attribute__((vector_size(VECTOR_BYTES)));

static inline __attribute__((always_inline)) int is_nothing(vector v) { return !(v[0] | v[1] | v[2] | v[3]); }

static inline __attribute__((always_inline)) int is_zero(const uint8_t *page) {
    const vector *at = __builtin_assume_aligned(page, ONION_PAGE_BYTES);
    for (size_t i = 0; i < ONION_PAGE_BYTES / VECTOR_BYTES; i += STEP)
        if (!is_nothing(at[i] | at[i + 1] | at[i + 2] | at[i + 3]))
            return 0;
    return 1;
}

static inline __attribute__((always_inline)) int is_same(const uint8_t *page, const uint8_t *other) {
    const vector *a = __builtin_assume_aligned(page, ONION_PAGE_BYTES);
    const vector *b = __builtin_assume_aligned(other, ONION_PAGE_BYTES);
    for (size_t i = 0; i < ONION_PAGE_BYTES / VECTOR_BYTES; i += STEP)
        if (!is_nothing((a[i] ^ b[i]) | (a[i + 1] ^ b[i + 1]) | (a[i + 2] ^ b[i + 2]) | (a[i + 3] ^ b[i + 3])))
            return 0;
    return 1;
}

static inline __attribute__((always_inline)) size_t classify(const uint8_t *pages, const uint8_t *parent, size_t count,
                                                             uint8_t *kinds) {
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *page = pages + i * ONION_PAGE_BYTES;
        if (parent && is_same(page, parent + i * ONION_PAGE_BYTES))
            kinds[i] = ONION_PAGE_SAME;
        else
            kinds[i] = is_zero(page) ? ONION_PAGE_ZERO : ONION_PAGE_DATA;
        found += kinds[i] != ONION_PAGE_SAME;
    }
    return found;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static size_t classify_avx2(const uint8_t *pages, const uint8_t *parent, size_t count,
                                                            uint8_t *kinds) {
    return classify(pages, parent, count, kinds);
}
#endif

size_t onion_pages_classify(const uint8_t *pages, const uint8_t *parent, size_t count, uint8_t *kinds) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return classify_avx2(pages, parent, count, kinds);
#endif
    return classify(pages, parent, count, kinds);
}
