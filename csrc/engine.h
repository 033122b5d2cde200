// Arguments of the kernels of the attack engine, `freeze` in Python, which are no ops of their own.
#pragma once
#include "types.h"

namespace fastadv {

// Activations and their gradients lie in blocks of 16 images x 32 channels of one pixel: [groups of
// 16 images, pixels, blocks of 32 channels, 16, 32], fp32 or bf16, the last block of channels
// filled up with zeros. A block is one AMX tile. A convolution finds the pixels that an output
// pixel needs by a list of taps, so that maps have no padding.
constexpr int images_per_block = 16, channels_per_block = 32, block_size = 512;

// The operations that finish a convolution's sums; those whose pointer is null are left out.
//   forward:   v = sums + bias + before -> out; z = scale v + shift; f(z) -> active; f'(z) -> slope
//   backward:  (sums + before) slope scale + after -> out
// f: none, min(max(z, 0), cap) or z sigmoid(z). out, active, before, after: blocks like the sums;
// slope: blocks for silu, one bit per element for relu (uint32 [groups, pixels, blocks, 16]), not
// written where null; bias, scale, shift: fp32 [blocks * 32].
struct Finish {
  bool backward;
  Activation activation;
  float cap;
  void *out, *active, *slope;
  const void *before, *after;
  const float *bias, *scale, *shift;
};

// Sums over taps: sum[p] = sum over (source, tap) of p's list of weight[tap] in[source]. The list
// of output pixel p is taps[start[p]] to taps[start[p + 1]], pairs (source pixel, tap).
// Of the last group's 16 images those beyond `images` are not written.
// weight of a dense convolution: dtype [out_blocks, taps, in_blocks, 32 / n, 32, n], n = 2 for bf16
// (pairs of input channels) and 1 for fp32; of a depthwise one: fp32 [taps, blocks * 32].
struct Convolution {
  const void *in, *weight;
  const int32_t *start, *taps;
  int64_t images, in_pixels, out_pixels, in_blocks, out_blocks, kernel;
  DType dtype;
  Finish finish;
};

// A dense 3 x 3 convolution of stride 1 by Winograd, see cpu/winograd.inl: tiles of 4 x 4 outputs,
// `winograd_rows` of them at a time, each at 36 points.
constexpr int winograd_points = 36, winograd_rows = 64;

struct Winograd {
  const void* in;       // blocks
  const float* weight;  // [out_blocks, 36, in_blocks, 32, 32]
  float* memory;        // [threads, 36, in_blocks + out_blocks, winograd_rows, 32], to work in
  int64_t images, height, width, top, left, out_height, out_width, in_blocks, out_blocks;
  DType dtype;
  Finish finish;
};

// Both layouts of a convolution's weight, see cpu/fold.inl; those of `fold_points` are fp32, of 9
// taps at Winograd's 36 points.
struct Fold {
  void *forward, *backward;
  const float* weight;  // [out_channels, in_channels, taps]
  const float* scale;   // [out_channels] or null
  int64_t out_channels, in_channels, taps, out_stride, in_stride, tap_stride;
  DType dtype;
};

// Maps in channels_last, dtype [images, pixels, channels], and their blocks.
struct Maps {
  void *maps, *blocks;
  int64_t images, pixels, channels;
  DType dtype;
};

struct Patches {
  void* out;                   // dtype [groups, pixels, size / 32, 16, 32]
  const float* x;              // [batch, ...], an image `image_stride` elements apart
  const float *scale, *shift;  // [size]
  const int32_t* offsets;      // [pixels, size filled up to whole blocks], into an image; -1: zero
  int64_t batch, pixels, size, image_stride;
  DType dtype;
};

struct PatchesBackward {
  float* grad;             // [batch, elements]
  const float* scale;      // [elements]
  const void* patches;     // dtype, as Patches has its out
  const int32_t* offsets;  // [terms, elements], into image 0 of a group's patches, -1 for none
  int64_t batch, elements, terms;
  int64_t image_size;  // pixels * size, the elements of one image's patches
  DType dtype;
};

}  // namespace fastadv
