/* All native kernels at all levels, and the choice between the levels at run time. native.h says how to add one. */

#include "native.h"

#define ENTRIES(X) \
    X(csr_linear) \
    X(csr_weight_grad) \
    X(csr_weight_grad_add) \
    X(csr_tiled) \
    X(sparse_conv2d) \
    X(sparse_conv2d_add) \
    X(sparse_conv2d_weight_grad) \
    X(sparse_conv2d_rows) \
    X(depthwise_rows) \
    X(max_pool_rows) \
    X(activate_planes) \
    X(plane_means) \
    X(scale_planes) \
    X(masked_update) \
    X(gather) \
    X(bias_relu) \
    X(relu_backward) \
    X(relu_backward_add) \
    X(cross_entropy) \
    X(cross_entropy_grad) \
    X(max_pool) \
    X(max_pool_backward) \
    X(transpose) \
    X(layer_norm) \
    X(gelu) \
    X(add) \
    X(multiply) \
    X(rotary) \
    X(token_attention) \
    X(self_attention) \
    X(sequence) \
    X(hash_weights) \
    X(score_update) \
    X(seed_linear) \
    X(subset_sum) \
    X(batch_norm) \
    X(batch_norm_backward)

#define FIRST_LEVEL
#define LEVEL plain
#define VEC 4
#include "native.h"
#include "activate.inc"
#include "csr_linear.inc"
#include "csr_tiled.inc"
#include "sparse_conv2d.inc"
#include "sparse_conv2d_rows.inc"
#include "depthwise_rows.inc"
#include "max_pool_rows.inc"
#include "step_parts.inc"
#include "token_parts.inc"
#include "rotary.inc"
#include "token_attention.inc"
#include "self_attention.inc"
#include "plane_parts.inc"
#include "masked_update.inc"
#include "score_update.inc"
#include "hash_weights.inc"
#include "seed_linear.inc"
#include "subset_sum.inc"
#include "batch_norm.inc"
#undef VEC
#undef LEVEL
#undef FIRST_LEVEL

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LEVEL avx2
#define BELOW plain
#define VEC 8
#include "native.h"
#include "activate.inc"
#include "csr_linear.inc"
#include "csr_tiled.inc"
#include "sparse_conv2d.inc"
#include "sparse_conv2d_rows.inc"
#include "depthwise_rows.inc"
#include "max_pool_rows.inc"
#include "step_parts.inc"
#include "token_parts.inc"
#include "rotary.inc"
#include "token_attention.inc"
#include "self_attention.inc"
#include "plane_parts.inc"
#include "masked_update.inc"
#include "score_update.inc"
#include "hash_weights.inc"
#include "seed_linear.inc"
#include "subset_sum.inc"
#include "batch_norm.inc"
#undef VEC
#undef BELOW
#undef LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#ifdef ALL_LEVELS
#pragma GCC target("avx2,fma")
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#endif
#define LEVEL avx512
#define BELOW avx2
#define VEC 16
#include "native.h"
#include "activate.inc"
#include "csr_linear.inc"
#include "csr_tiled.inc"
#include "sparse_conv2d.inc"
#include "sparse_conv2d_rows.inc"
#include "depthwise_rows.inc"
#include "max_pool_rows.inc"
#include "step_parts.inc"
#include "token_parts.inc"
#include "rotary.inc"
#include "token_attention.inc"
#include "self_attention.inc"
#include "plane_parts.inc"
#include "masked_update.inc"
#include "score_update.inc"
#include "hash_weights.inc"
#include "seed_linear.inc"
#include "subset_sum.inc"
#include "batch_norm.inc"
#undef VEC
#undef BELOW
#undef LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

struct entries {
#define X(entry) void (*entry)(const void *args);
    ENTRIES(X)
#undef X
};

static const struct entries levels[] = {
#define X(entry) .entry = entry##_plain,
    {ENTRIES(X)},
#undef X
#if defined(__x86_64__)
#define X(entry) .entry = entry##_avx2,
    {ENTRIES(X)},
#undef X
#define X(entry) .entry = entry##_avx512,
    {ENTRIES(X)},
#undef X
#endif
};

static int chosen = 0;

/* The highest level of this machine: 0 plain, 1 avx2, 2 avx512. Tests define ALL_LEVELS: then vectors of 16 are
   made of AVX2's, and what a machine without AVX-512 would never run is run. */
int sparselth_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#ifdef ALL_LEVELS
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 2 : 0;
#else
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
#endif
#else
    return 0;
#endif
}

/* All entries work at this level from now on; returns whether the machine has it. */
int sparselth_choose(int level) {
    if (level < 0 || level > sparselth_level())
        return 0;
    chosen = level;
    return 1;
}

#define X(entry) \
    void sparselth_##entry(const void *args) { levels[chosen].entry(args); }
ENTRIES(X)
#undef X
