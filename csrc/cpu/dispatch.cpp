// Which instruction sets this build carries and this machine can run.
#include "../table.h"
#ifdef FASTADV_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastadv {
namespace scalar {
extern const Table table;
}
#ifdef FASTADV_HAS_AVX512
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
#endif
#ifdef FASTADV_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Table table;
}
#endif
#ifdef FASTADV_HAS_AMX
namespace amx {
extern const Table table;
}

// Whether the processor has the tiles (CPUID leaf 7) and the kernel lets this process use them.
static bool tiles() noexcept {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile) &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

int tables(const Table** out) noexcept {
  int count = 0;
#ifdef FASTADV_HAS_AVX512
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(FASTADV_HAS_AMX) || defined(FASTADV_HAS_AVX512_BF16)
    const bool bf16 = __builtin_cpu_supports("avx512bf16");
#endif
#ifdef FASTADV_HAS_AMX
    if (bf16 && tiles()) out[count++] = &amx::table;
#endif
#ifdef FASTADV_HAS_AVX512_BF16
    if (bf16) out[count++] = &avx512_bf16::table;
#endif
    out[count++] = &avx512::table;
  }
  if (avx2) {
    out[count++] = &avx2::table;
  }
#endif
  out[count++] = &scalar::table;
  return count;
}

}  // namespace fastadv
