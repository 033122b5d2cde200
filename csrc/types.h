// The choices that kernels take. In every struct of arguments strides are in elements, and a
// pointer is to raw memory and not null unless its comment says so.
#pragma once
#include <cstdint>

// An enum, and its names as text, by which Python passes a choice (see bind.cpp).
#define FASTADV_CHOICE(Type, ...)        \
  enum class Type : int { __VA_ARGS__ }; \
  constexpr const char* names_of(Type) { return #__VA_ARGS__; }

namespace fastadv {

FASTADV_CHOICE(DType, f32, bf16, f16)
FASTADV_CHOICE(Norm, linf, l2)
FASTADV_CHOICE(Init, uniform, gaussian)
FASTADV_CHOICE(Distance, mse, l2, cosine)
FASTADV_CHOICE(Reduction, none, sum, mean)
FASTADV_CHOICE(Activation, none, relu, silu)

}  // namespace fastadv
