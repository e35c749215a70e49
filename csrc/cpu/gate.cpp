#include "gate.h"

#include "cpu/activations.h"
#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

// d gelu / dm = P(X <= m) + m p(m), p the normal density
BIFLOW_INLINE vfloat gelu_gradient(vfloat m) {
  const vfloat density = 0.398942280f * exp(-0.5f * (m * m));
  return normal_cdf(m) + m * (abs(m) < 20.f ? density : vfloat{});  // no inf * 0
}

}  // namespace

void gate(const GateParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t n = p.channels;
    for (int64_t row = begin; row < end; ++row) {
      Element* y = static_cast<Element*>(p.y) + row * n;
      const Element* m = static_cast<const Element*>(p.m) + row * n * (p.kind == Gate::swiglu ? 2 : 1);
      if (p.kind == Gate::swiglu)
        each_vector<float>(n, [&](int64_t i, auto k) {
          const vfloat a = load_n(m + i, k);
          store_n(y + i, a * sigmoid(a) * load_n(m + n + i, k), k);
        });
      else
        each_vector<float>(n, [&](int64_t i, auto k) { store_n(y + i, gelu(load_n(m + i, k)), k); });
    }
  });
}

void gate_backward(const GateParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t n = p.channels;
    for (int64_t row = begin; row < end; ++row) {
      const Element* grad = static_cast<const Element*>(p.grad_y) + row * n;
      const int64_t offset = row * n * (p.kind == Gate::swiglu ? 2 : 1);
      const Element* m = static_cast<const Element*>(p.m) + offset;
      Element* to = static_cast<Element*>(p.grad_m) + offset;
      if (p.kind == Gate::swiglu)
        each_vector<float>(n, [&](int64_t i, auto k) {
          const vfloat a = load_n(m + i, k), b = load_n(m + n + i, k), g = load_n(grad + i, k);
          const vfloat s = sigmoid(a), silu = a * s;
          store_n(to + i, g * b * (s + silu * (1.f - s)), k);
          store_n(to + n + i, g * silu, k);
        });
      else
        each_vector<float>(
            n, [&](int64_t i, auto k) { store_n(to + i, load_n(grad + i, k) * gelu_gradient(load_n(m + i, k)), k); });
    }
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
