// Loops over a row of elements in whole vectors and a rest, and rows of any dtype as floats.
#pragma once

#include <memory>
#include <type_traits>

#include "affine.h"
#include "cpu/convert.h"

namespace biflow::cpu::BIFLOW_ISA {

template <class P>
auto load_n(const P* p, int n) {
  return load_partial(p, n);
}
template <class P, int kN>
auto load_n(const P* p, std::integral_constant<int, kN>) {
  return load(p);
}
template <class P, class V>
void store_n(P* p, V v, int n) {
  store_partial(p, v, n);
}
template <class P, class V, int kN>
void store_n(P* p, V v, std::integral_constant<int, kN>) {
  store(p, v);
}

template <class S, class F>
inline void each_vector(int64_t n, F&& f) {  // f(first element, how many)
  constexpr int lanes = VectorOf<S>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, std::integral_constant<int, lanes>());
  if constexpr (lanes > 1)
    if (i < n) f(i, static_cast<int>(n - i));
}

// Calls f(float{} | bf16{} | f16{}) for a dtype; f64 is refused by the callers.
template <class F>
inline void with_float_type(DType type, F&& f) {
  switch (type) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Room for rows of n floats, each aligned and padded to whole vectors; zeros.
class Rows {
 public:
  Rows(int64_t n, int count) : stride_(padded(n)), memory_(new float[count * stride_ + kLanes]), first_(memory_.get()) {
    first_ += (kVectorBytes - reinterpret_cast<uintptr_t>(first_) % kVectorBytes) % kVectorBytes / sizeof(float);
    for (int64_t i = 0; i < count * stride_; ++i) first_[i] = 0;
  }
  float* operator[](int i) const { return first_ + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float[]> memory_;
  float* first_;
};

// Row `row` of n elements as floats; zeros follow up to a whole vector.
inline void read_row(DType type, const void* base, int64_t row, int64_t n, float* to) {
  with_float_type(type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(base) + row * n;
    each_vector<float>(n, [&](int64_t i, auto m) { store(to + i, load_n(from + i, m)); });
  });
}

inline void write_row(DType type, const float* from, void* base, int64_t row, int64_t n) {
  with_float_type(type, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(base) + row * n;
    each_vector<float>(n, [&](int64_t i, auto m) { store_n(to + i, load(from + i), m); });
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
