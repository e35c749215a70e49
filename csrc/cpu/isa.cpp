#include "cpu/isa.h"

#include <atomic>
#include <cstring>

namespace biflow::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa best_isa() {
#ifdef BIFLOW_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    // all that CMakeLists.txt compiles the objects with
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return Isa::portable;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2")) return Isa::avx2;
    return Isa::portable;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

static std::atomic<int> forced{-1};

Isa active_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  return f < 0 ? best_isa() : static_cast<Isa>(f);
}

bool force_isa(const char* name) {
  if (!std::strcmp(name, "best")) {
    forced = -1;
    return true;
  }
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (!std::strcmp(name, isa_name(static_cast<Isa>(i)))) {
      forced = i;
      return true;
    }
  return false;
}

}  // namespace biflow::cpu
