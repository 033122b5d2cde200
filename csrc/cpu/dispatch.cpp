// Which instruction sets this build carries and this machine can run.
#include "../table.h"

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

int tables(const Table** out) noexcept {
  int count = 0;
#ifdef FASTADV_HAS_AVX512
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
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
