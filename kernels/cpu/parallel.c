#include "parallel.h"

#include <stdatomic.h>

#include "library.h"

/* OpenMP's entry point, taken from the runtime that torch loaded. A pool of our own would fight torch's threads, which
 * spin for a while after each of its operations. */
typedef void (*parallel_fn)(void (*)(void *), void *, unsigned threads, unsigned flags);

static parallel_fn parallel_region;

struct team {
    item_fn fn;
    void *context;
    int64_t count;
    _Atomic int64_t next;
};

static void take_items(void *argument) {
    struct team *team = argument;
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
        if (item >= team->count) return;
        team->fn(team->context, item);
    }
}

void run_items(item_fn fn, void *context, int64_t count, int threads) {
    struct team team = {fn, context, count, 0};
    if (threads > count) threads = (int)count;
    if (parallel_region && threads > 1)
        parallel_region(take_items, &team, (unsigned)threads, 0);
    else
        take_items(&team);
}

EXPORT void kvferry_set_parallel(void *gomp_parallel) {
    parallel_region = (parallel_fn)gomp_parallel;
}
