// Which instruction set the CPU kernels run with.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace {

std::string cpu_isa() { return biflow::cpu::isa_name(biflow::cpu::active_isa()); }

void force_cpu_isa(std::string name) {
  STD_TORCH_CHECK(biflow::cpu::force_isa(name.c_str()), "force_cpu_isa: expected best, portable, avx2, avx512 or amx, ",
                  "one that this CPU has (it has ", biflow::cpu::isa_name(biflow::cpu::best_isa()), "), got ", name);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("force_cpu_isa", TORCH_BOX(&force_cpu_isa));
}
