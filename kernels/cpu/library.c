#include "library.h"

#include <cpuid.h>
#include <stdint.h>

#ifndef KVFERRY_BUILD_ID
#define KVFERRY_BUILD_ID "unknown"
#endif

/* hatch_build.py looks for this text in the file to see whether it is up to date. */
EXPORT const char kvferry_build_id[] = "kvferry-build:" KVFERRY_BUILD_ID;

/* Whether this CPU, and the operating system's register saving, can run the rest of the library. */
EXPORT int kvferry_cpu_supported(void) {
    unsigned a, b, c, d;
    const unsigned need1 = (1u << 12) | (1u << 27) | (1u << 28) | (1u << 29); /* FMA, OSXSAVE, AVX, F16C */
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & need1) != need1) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & (1u << 5))) return 0; /* AVX2 */
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}
