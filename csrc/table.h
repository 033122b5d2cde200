// All kernels for CPUs: one list, and the table of plain function pointers that each instruction
// set makes of it.
//
// Rules for every kernel: noexcept, allocates nothing, prints nothing; `threads` is the OpenMP team
// size and never changes the result; floats are computed in fp32 without FMA contraction, so
// element-wise results agree bit for bit between instruction sets.
#pragma once
#include "apgd_step.h"
#include "augment.h"
#include "batch_norm.h"
#include "cross_entropy.h"
#include "engine.h"
#include "feature_distance.h"
#include "ikl.h"
#include "labelled.h"
#include "pgd_step.h"
#include "random_start.h"
#include "softmax_entropy.h"
#include "softmax_kl.h"

// KERNEL(result, name, arguments) for `result name(const arguments&, int threads)`.
#define FASTADV_KERNELS(KERNEL)                        \
  KERNEL(void, apgd_step, ApgdStep)                    \
  KERNEL(void, augment, Augment)                       \
  KERNEL(void, batch_norm, BatchNorm)                  \
  KERNEL(void, batch_norm_backward, BatchNormBackward) \
  KERNEL(void, convolution, Convolution)               \
  KERNEL(int64_t, cross_entropy, CrossEntropy)         \
  KERNEL(void, depthwise, Convolution)                 \
  KERNEL(int64_t, dlr, Labelled)                       \
  KERNEL(void, feature_distance, FeatureDistance)      \
  KERNEL(void, fold, Fold)                             \
  KERNEL(void, fold_points, Fold)                      \
  KERNEL(void, from_blocks, Maps)                      \
  KERNEL(int64_t, ikl, IKL)                            \
  KERNEL(int64_t, margin, Labelled)                    \
  KERNEL(int64_t, mart_bce, Labelled)                  \
  KERNEL(void, patches, Patches)                       \
  KERNEL(void, patches_backward, PatchesBackward)      \
  KERNEL(void, pgd_step, PgdStep)                      \
  KERNEL(void, random_start, RandomStart)              \
  KERNEL(void, softmax_entropy, SoftmaxEntropy)        \
  KERNEL(void, softmax_kl, SoftmaxKL)                  \
  KERNEL(void, to_blocks, Maps)                        \
  KERNEL(void, winograd, Winograd)

namespace fastadv {

struct Table {
  const char* isa;
#define FASTADV_POINTER(result, name, arguments) \
  result (*name)(const arguments& args, int threads) noexcept;
  FASTADV_KERNELS(FASTADV_POINTER)
#undef FASTADV_POINTER
};

// The tables compiled in that this machine can run, fastest first; returns how many.
int tables(const Table** out) noexcept;
constexpr int max_tables = 5;

}  // namespace fastadv
