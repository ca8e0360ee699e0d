/* What Python sees: exported names and status codes. native.py mirrors both. */
#pragma once

#define EXPORT __attribute__((visibility("default")))

enum status {
    STATUS_OK = 0,
    STATUS_NOT_FINITE = 1,
    STATUS_HEAD_DIM = 2,
    STATUS_BLOCK_ID = 3,
    STATUS_SLOT = 4,
    STATUS_LENGTH = 5,
    STATUS_MEMORY = 6,
    STATUS_TERMS = 7,
};
