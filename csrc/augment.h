#pragma once
#include "types.h"

namespace fastadv {

struct Augment {
  float* out;  // [batch, channels, height, width], or [batch, height, width, channels] in memory
  const uint8_t* images;   // [batch, channels, height, width], contiguous
  const int64_t *dy, *dx;  // [batch]
  const bool* flip;        // [batch]
  int64_t batch, channels, height, width, padding;
  bool channels_last;  // of out
};

}  // namespace fastadv
