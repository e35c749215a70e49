// bf16 and fp16 in memory, float in registers: load and store with rounding to nearest even, and pairs [s t] apart.
#pragma once

#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "cpu/simd_math.h"

namespace biflow::cpu::BIFLOW_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
typedef uint16_t vhalf __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef uint16_t vhalf_unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t vuint __attribute__((vector_size(kVectorBytes), may_alias));

inline vfloat load(const bf16* p) {
  const vhalf h = *reinterpret_cast<const vhalf_unaligned*>(p);
  return reinterpret_cast<vfloat>(__builtin_convertvector(h, vuint) << 16);
}

#ifdef __AVX512BF16__
inline void store(bf16* p, vfloat v) {  // subnormals become zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
}
#else
inline void store(bf16* p, vfloat v) {
  const vuint u = reinterpret_cast<vuint>(v);
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vuint quiet = (u >> 16) | 0x40;
  *reinterpret_cast<vhalf_unaligned*>(p) = __builtin_convertvector(v == v ? rounded : quiet, vhalf);
}
#endif

// the two bf16 values of a 32-bit word
inline vfloat low_half(vuint w) { return reinterpret_cast<vfloat>(w << 16); }
inline vfloat high_half(vuint w) { return reinterpret_cast<vfloat>(w & 0xffff0000u); }
inline vuint rounded_bf16(vfloat v) {  // in the high half, to nearest even; the low half holds anything
  const vuint u = reinterpret_cast<vuint>(v);
  return v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
}
inline vuint load_words(const float* p) { return reinterpret_cast<vuint>(load(p)); }

#if defined(__AVX512F__)
inline vfloat load(const f16* p) {
  return reinterpret_cast<vfloat>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline void store(f16* p, vfloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline vfloat load(const f16* p) {
  return reinterpret_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(f16* p, vfloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vfloat load(const f16* p) {
  const vuint h = __builtin_convertvector(vhalf(*reinterpret_cast<const vhalf_unaligned*>(p)), vuint);
  const vuint magnitude = (h & 0x7fff) << 13;  // exponent biased by 15 where float has 127: 2^112 too small
  const vuint value = reinterpret_cast<vuint>(reinterpret_cast<vfloat>(magnitude) * 0x1p112f);
  const vuint special = reinterpret_cast<vuint>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<vfloat>(value | special | ((h & 0x8000) << 16));
}
inline void store(f16* p, vfloat v) {
  const vuint u = reinterpret_cast<vuint>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const vuint normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // a float near 1/2 has the spacing of fp16's subnormals: the addition rounds
  const vuint subnormal = reinterpret_cast<vuint>(abs(v) + 0.5f) - reinterpret_cast<vuint>(broadcast(0.5f));
  vuint h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? vuint{} + 0x7c00 : h;  // 65520 and more round to inf
  h = magnitude > 0x7f800000u ? vuint{} + 0x7e00 : h;
  *reinterpret_cast<vhalf_unaligned*>(p) = __builtin_convertvector(h | sign, vhalf);
}
#endif

template <class Half>
inline vfloat load_partial_half(const Half* p, int n) {
  alignas(kVectorBytes) Half lane[kLanes] = {};
  std::memcpy(lane, p, sizeof(Half) * n);
  return load(lane);
}
template <class Half>
inline void store_partial_half(Half* p, vfloat v, int n) {
  alignas(kVectorBytes) Half lane[kLanes];
  store(lane, v);
  std::memcpy(p, lane, sizeof(Half) * n);
}
inline vfloat load_partial(const bf16* p, int n) { return load_partial_half(p, n); }
inline vfloat load_partial(const f16* p, int n) { return load_partial_half(p, n); }
inline void store_partial(bf16* p, vfloat v, int n) { store_partial_half(p, v, n); }
inline void store_partial(f16* p, vfloat v, int n) { store_partial_half(p, v, n); }

template <std::size_t... I>
inline void split_pairs(vfloat low, vfloat high, vfloat& even, vfloat& odd, std::index_sequence<I...>) {
  even = __builtin_shufflevector(low, high, (2 * I)...);
  odd = __builtin_shufflevector(low, high, (2 * I + 1)...);
}
// (s0 t0 s1 t1 ..) in two vectors -> (s0 s1 ..), (t0 t1 ..)
inline void split_pairs(vfloat low, vfloat high, vfloat& even, vfloat& odd) {
  split_pairs(low, high, even, odd, std::make_index_sequence<kLanes>());
}

template <std::size_t... I>
inline void join_pairs(vfloat even, vfloat odd, vfloat& low, vfloat& high, std::index_sequence<I...>) {
  low = __builtin_shufflevector(even, odd, (I % 2 ? kLanes + I / 2 : I / 2)...);
  high = __builtin_shufflevector(even, odd, (kLanes / 2 + (I % 2 ? kLanes + I / 2 : I / 2))...);
}
inline void join_pairs(vfloat even, vfloat odd, vfloat& low, vfloat& high) {
  join_pairs(even, odd, low, high, std::make_index_sequence<kLanes>());
}

}  // namespace biflow::cpu::BIFLOW_ISA
