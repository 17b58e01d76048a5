/* Vectors and levels of the native CPU kernels.

   Every op is one NAME.inc, written once against VEC floats to a vector and included by native.c once a level:

       plain    VEC 4    what every machine of the architecture has (SSE2, NEON)
       avx2     VEC 8    AVX2 and FMA
       avx512   VEC 16   AVX-512 F, BW, DQ, VL

   To add an op:
     1. NAME.inc: a struct of arguments (inside #ifdef FIRST_LEVEL, for it must be defined once), which a
        ctypes.Structure in NAME.py mirrors field by field, and for each entry
            static void NAME(entry)(const void *args) { const struct entry *a = args; ... }
        NAME(x) is x_plain, x_avx2 or x_avx512: use it for every function. Helpers are INLINE.
     2. native.c: `#include "NAME.inc"` once in each of the three levels, and X(entry) in ENTRIES, as in _native.py.
     3. NAME.py: `_native.bind("entry", arguments, tensors...)` gives a function that calls the entry.
   Rebuild with `python setup.py build_ext --inplace` (in the environment that runs the tests).

   Rules: no -ffast-math (NaN must spread), so sums are reassociated by hand only; a result must not depend on
   the number of threads; with one thread no OpenMP code may be entered, since workers fork: `parallel` sees
   to both when an op splits over rows. */

#ifndef SPARSELTH_NATIVE_H
#define SPARSELTH_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define NAME(x) PASTE(x, LEVEL)
#define INLINE static inline __attribute__((always_inline, unused))
#define PREFETCH(p) __builtin_prefetch(p)
#define PREFETCH_FAR(p) __builtin_prefetch(p, 0, 2) /* into the second-level cache */

/* Calls part(args, from, to) for ranges that cover 0 .. count and are not empty, each on one of `threads` threads. */
static inline void parallel(void (*part)(const void *args, int64_t from, int64_t to), const void *args, int64_t count,
                     int threads) {
    if (threads > count)
        threads = (int)count;
    if (threads <= 1) {
        if (count > 0)
            part(args, 0, count);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int64_t t = 0; t < threads; t++)
        part(args, count * t / threads, count * (t + 1) / threads);
}

/* SHUFFLE(a, b, i, j, ...) has element i of a and b one after the other, then element j, ... */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Four floats. */
typedef float vec4 __attribute__((vector_size(16)));
typedef float loose_vec4 __attribute__((vector_size(16), aligned(4), may_alias));

/* Scratch of one thread: 256 KB, half of a small second-level cache. */
#define SCRATCH (1 << 16) /* floats */
static _Thread_local float scratch[SCRATCH] __attribute__((aligned(64), unused));

#endif

#ifdef LEVEL

#define vec NAME(vec)     /* VEC floats; `vec * float` and `vec + float` broadcast */
#define ivec NAME(ivec)   /* VEC int32, the result of comparing two vec: -1 or 0 */
#define uvec NAME(uvec)   /* VEC uint32 */
typedef float vec __attribute__((vector_size(4 * VEC)));
typedef int32_t ivec __attribute__((vector_size(4 * VEC)));
typedef uint32_t uvec __attribute__((vector_size(4 * VEC)));
typedef float NAME(loose) __attribute__((vector_size(4 * VEC), aligned(4), may_alias));

/* Every second float of two vectors one after the other, from the first or the second on. */
#undef EVENS
#undef ODDS
#if VEC == 16
#define EVENS(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODDS(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#elif VEC == 8
#define EVENS(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODDS(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#else
#define EVENS(a, b) SHUFFLE(a, b, 0, 2, 4, 6)
#define ODDS(a, b) SHUFFLE(a, b, 1, 3, 5, 7)
#endif

#define load NAME(load)
#define store NAME(store)
#define vec_and NAME(vec_and)
#define vec_lane NAME(vec_lane)

INLINE vec load(const float *p) { return *(const NAME(loose) *)p; } /* any alignment */
INLINE void store(float *p, vec v) { *(NAME(loose) *)p = v; }
INLINE vec4 vec_lane(vec v, int i) { /* floats 4 i to 4 i + 3 */
    vec4 lane;
    memcpy(&lane, (const char *)&v + 16 * i, sizeof lane);
    return lane;
}
INLINE vec vec_and(vec v, ivec keep) { return (vec)((ivec)v & keep); } /* 0 where keep is 0, else v */

#endif
