#include "gate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "options.h"

namespace {

using biflow::DType;
using biflow::GateParams;
using torch::stable::Tensor;

std::vector<int64_t> result_shape(const Tensor& m, const std::string& kind) {
  STD_TORCH_CHECK(kind == "swiglu", "gate: on a CPU the op has swiglu only, got ", kind);
  STD_TORCH_CHECK(m.dim() > 0 && m.size(m.dim() - 1) % 2 == 0, "gate: m must have an even number of channels");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < m.dim(); ++i) shape.push_back(m.size(i));
  shape.back() /= 2;
  return shape;
}

GateParams params(const Tensor& m, const Tensor& y) {
  GateParams p;
  p.type = biflow::dtype_of("gate", "m", m);
  STD_TORCH_CHECK(p.type != DType::f64, "gate: m must be float32, bfloat16 or float16");
  p.m = m.const_data_ptr();
  p.channels = y.size(y.dim() - 1);
  p.rows = p.channels ? y.numel() / p.channels : 0;
  return p;
}

void run(const GateParams& p, void (*kernel)(const GateParams&, int64_t, int64_t)) {
  constexpr int64_t kGrain = 16384;  // elements a thread takes at least
  torch::stable::parallel_for(0, p.rows, 1 + kGrain / (p.channels > 0 ? p.channels : 1),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor gate(Tensor m_in, std::string kind) {
  const Tensor m = torch::stable::contiguous(m_in);
  const std::vector<int64_t> shape = result_shape(m, kind);
  Tensor y = torch::stable::new_empty(m, {shape.data(), shape.size()});
  GateParams p = params(m, y);
  p.y = y.mutable_data_ptr();
  run(p, &biflow::cpu::gate);
  return y;
}

Tensor gate_backward(Tensor grad_in, Tensor m_in, std::string kind) {
  const Tensor m = torch::stable::contiguous(m_in), grad = torch::stable::contiguous(grad_in);
  const std::vector<int64_t> shape = result_shape(m, kind);
  bool fits = grad.dim() == m.dim() && grad.scalar_type() == m.scalar_type();
  for (int64_t i = 0; fits && i < grad.dim(); ++i) fits = grad.size(i) == shape[i];
  STD_TORCH_CHECK(fits, "gate: the gradient must have the shape and dtype of the result");
  Tensor grad_m = torch::stable::new_empty(m, m.sizes());
  GateParams p = params(m, grad);
  p.grad_y = grad.const_data_ptr();
  p.grad_m = grad_m.mutable_data_ptr();
  run(p, &biflow::cpu::gate_backward);
  return grad_m;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}
