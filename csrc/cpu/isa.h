// Instruction sets of the CPU kernels. Each csrc/cpu/<op>.cpp is compiled once per instruction set with
// BIFLOW_ISA = portable | avx2 | avx512 | amx and defines its entry points in namespace biflow::cpu::BIFLOW_ISA.
// amx is avx512 with bf16 conversions and tile products: only kernels that multiply matrices are compiled for it.
#pragma once

namespace biflow::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

Isa best_isa();                    // the best one that this CPU and this build have
Isa active_isa();                  // the one that kernels run with: best_isa() unless a test forced another
bool force_isa(const char* name);  // for tests; false when the name is unknown or the CPU lacks it
const char* isa_name(Isa isa);

}  // namespace biflow::cpu

// Declares `void name params` for each instruction set, and a function of the same name that calls the active one.
#ifdef BIFLOW_X86
#define BIFLOW_DECLARE(isa, name, params) \
  namespace isa {                         \
  void name params;                       \
  }
#define BIFLOW_DISPATCH(name, params, args, best) \
  BIFLOW_DECLARE(portable, name, params)          \
  BIFLOW_DECLARE(avx2, name, params)              \
  BIFLOW_DECLARE(avx512, name, params)            \
  inline void name params {                       \
    switch (active_isa()) {                       \
      case Isa::amx:                              \
        return best::name args;                   \
      case Isa::avx512:                           \
        return avx512::name args;                 \
      case Isa::avx2:                             \
        return avx2::name args;                   \
      default:                                    \
        return portable::name args;               \
    }                                             \
  }
#define BIFLOW_CPU_KERNEL(name, params, args) BIFLOW_DISPATCH(name, params, args, avx512)
#define BIFLOW_MATRIX_KERNEL(name, params, args) \
  BIFLOW_DECLARE(amx, name, params)              \
  BIFLOW_DISPATCH(name, params, args, amx)
#else
#define BIFLOW_CPU_KERNEL(name, params, args) \
  namespace portable {                        \
  void name params;                           \
  }                                           \
  inline void name params { portable::name args; }
#define BIFLOW_MATRIX_KERNEL BIFLOW_CPU_KERNEL
#endif
