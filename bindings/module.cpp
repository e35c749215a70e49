// biflow._C: what this build contains and what this CPU offers. No tensors; importing it needs no torch.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and CPU information of biflow";
  m.def(
      "build_info",
      [] {
        py::dict d;
        d["version"] = BIFLOW_VERSION;
        d["compiler"] = __VERSION__;
        d["instruction_sets"] = py::str(BIFLOW_ISAS).attr("split")();
        d["cuda"] = py::str(BIFLOW_CUDA).attr("split")();
        return d;
      },
      "dict: version, compiler; what was compiled in: instruction_sets, cuda (architectures; empty: no kernels)");
  m.def(
      "best_isa", [] { return biflow::cpu::isa_name(biflow::cpu::best_isa()); },
      "str: the instruction set that kernels use on this CPU");
}
