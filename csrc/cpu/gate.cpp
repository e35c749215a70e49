#include "gate.h"

#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {

void gate(const GateParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t n = p.channels;
    for (int64_t row = begin; row < end; ++row) {
      const Element *first = static_cast<const Element*>(p.m) + 2 * row * n, *second = first + n;
      Element* y = static_cast<Element*>(p.y) + row * n;
      each_vector<float>(n, [&](int64_t i, auto k) {
        const vfloat a = load_n(first + i, k);
        store_n(y + i, a * sigmoid(a) * load_n(second + i, k), k);
      });
    }
  });
}

void gate_backward(const GateParams& p, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t n = p.channels;
    for (int64_t row = begin; row < end; ++row) {
      const Element *first = static_cast<const Element*>(p.m) + 2 * row * n, *second = first + n;
      const Element* grad = static_cast<const Element*>(p.grad_y) + row * n;
      Element *to_first = static_cast<Element*>(p.grad_m) + 2 * row * n, *to_second = to_first + n;
      each_vector<float>(n, [&](int64_t i, auto k) {
        const vfloat a = load_n(first + i, k), b = load_n(second + i, k), g = load_n(grad + i, k);
        const vfloat s = sigmoid(a), silu = a * s;
        store_n(to_first + i, g * b * (s + silu * (1.f - s)), k);
        store_n(to_second + i, g * silu, k);
      });
    }
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
