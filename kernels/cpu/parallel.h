/* Work items on the thread pool that torch already has. */
#pragma once

#include <stdint.h>

typedef void (*item_fn)(void *context, int64_t item);

/* Runs fn(context, item) for item = 0 .. count - 1, in any order, on up to `threads` threads, and returns when all are
 * done. */
void run_items(item_fn fn, void *context, int64_t count, int threads);
