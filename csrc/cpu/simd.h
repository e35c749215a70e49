// A vector of floats as wide as the instruction set this file is compiled for, written with the compiler's vector
// extensions: arithmetic, comparison and ?: work lane by lane, a * b + c contracts to a fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace biflow::cpu::BIFLOW_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kLanes = kVectorBytes / 4;
typedef float vfloat __attribute__((vector_size(kVectorBytes), may_alias));
typedef float vfloat_unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(kVectorBytes), may_alias));

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat_unaligned*>(p) = v; }
inline vfloat broadcast(float x) { return x - vfloat{}; }  // x + 0 would be computed: it is not -0 for x = -0

inline vfloat load_partial(const float* p, int n, float fill = 0.f) {  // lanes >= n hold `fill`
  vfloat v = broadcast(fill);
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
}
inline void store_partial(float* p, vfloat v, int n) { std::memcpy(p, &v, sizeof(float) * n); }

inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

template <int kBy, std::size_t... I>
inline vfloat rotated(vfloat v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, static_cast<int>((I + kBy) % kLanes)...);
}
template <int kHalf, class Combine>
inline float reduce(vfloat v, Combine&& combine) {  // lane i with lane i + kHalf, then the halves of what is left
  v = combine(v, rotated<kHalf>(v, std::make_index_sequence<kLanes>()));
  if constexpr (kHalf > 1)
    return reduce<kHalf / 2>(v, combine);
  else
    return v[0];
}

inline float reduce_add(vfloat v) {  // pairwise: the same order on every call
  return reduce<kLanes / 2>(v, [](vfloat a, vfloat b) { return a + b; });
}
inline float reduce_max(vfloat v) {
  return reduce<kLanes / 2>(v, [](vfloat a, vfloat b) { return max(a, b); });
}

}  // namespace biflow::cpu::BIFLOW_ISA
