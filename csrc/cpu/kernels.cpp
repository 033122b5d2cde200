// All CPU kernels of one instruction set. CMake compiles this file once per instruction set with
// its flags and FASTADV_ISA = scalar | avx2 | avx512 | avx512_bf16 | amx. Everything but the table
// is internal: a weak symbol shared between the objects would let the linker put AVX-512 code into
// the scalar path.
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "../table.h"
#include "ball.h"
#include "blocks.h"
#include "rows.h"
#include "vec.h"
#include "vec_math.h"

namespace fastadv::FASTADV_ISA {
namespace {
#include "apgd_step.inl"
#include "augment.inl"
#include "batch_norm.inl"
#include "convolution.inl"
#include "cross_entropy.inl"
#include "dlr.inl"
#include "feature_distance.inl"
#include "fold.inl"
#include "ikl.inl"
#include "maps.inl"
#include "margin.inl"
#include "mart_bce.inl"
#include "patches.inl"
#include "pgd_step.inl"
#include "random_start.inl"
#include "softmax_entropy.inl"
#include "softmax_kl.inl"
#include "winograd.inl"
}  // namespace

#define FASTADV_STRING_(x) #x
#define FASTADV_STRING(x) FASTADV_STRING_(x)
#define FASTADV_ENTRY(result, name, arguments) name,
extern const Table table;
const Table table = {FASTADV_STRING(FASTADV_ISA), FASTADV_KERNELS(FASTADV_ENTRY)};

}  // namespace fastadv::FASTADV_ISA
