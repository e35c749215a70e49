#include "cpu/isa.h"

#include <atomic>
#include <cstring>
#ifdef BIFLOW_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace biflow::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

#ifdef BIFLOW_X86
// The CPU has AMX tiles and their bf16 product, and conversions to bf16; and Linux lets this process use the tiles'
// registers, which it must be asked for once.
static bool has_amx() {
#ifdef __linux__
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tiles = edx & (1u << 24), products = edx & (1u << 22);
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  const bool conversions = eax & (1u << 5);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles && products && conversions && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#ifdef BIFLOW_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    // all that CMakeLists.txt compiles the objects with
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return Isa::portable;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return has_amx() ? Isa::amx : Isa::avx512;
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
