// A vector of floats as wide as the instruction set this file is compiled for, written with the compiler's vector
// extensions: arithmetic, comparison and ?: work lane by lane, a * b + c contracts to a fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>

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
inline vfloat broadcast(float x) { return vfloat{} + x; }

inline vfloat load_partial(const float* p, int n, float fill = 0.f) {  // lanes >= n hold `fill`
  vfloat v = broadcast(fill);
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
}
inline void store_partial(float* p, vfloat v, int n) { std::memcpy(p, &v, sizeof(float) * n); }

inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

inline float reduce_add(vfloat v) {  // pairwise: the same order on every call
  alignas(kVectorBytes) float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
inline float reduce_max(vfloat v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace biflow::cpu::BIFLOW_ISA
