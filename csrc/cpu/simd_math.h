// exp, log, log1p, tanh, sigmoid over a vector of floats: about 1 ulp, subnormals and infinities as IEEE has them, NaN
// propagates. The same names over double are the scalar ones of libm, so kernels can be written once for both.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "cpu/simd.h"

// Left to itself the compiler calls the larger ones, and then computes what the caller does not use.
#define BIFLOW_INLINE inline __attribute__((always_inline))

namespace biflow::cpu::BIFLOW_ISA {

template <class Scalar>
struct VectorOf;  // the vector that kernels use for a scalar type
template <>
struct VectorOf<float> {
  using type = vfloat;
  static constexpr int lanes = kLanes;
};
template <>
struct VectorOf<double> {
  using type = double;
  static constexpr int lanes = 1;
};

inline double load(const double* p) { return *p; }
inline void store(double* p, double v) { *p = v; }
inline double load_partial(const double* p, int) { return *p; }
inline void store_partial(double* p, double v, int) { *p = v; }
inline double reduce_add(double v) { return v; }

template <class V>
inline V constant(double x) {
  if constexpr (std::is_same_v<V, double>)
    return x;
  else
    return broadcast(static_cast<float>(x));
}

inline vint as_int(vfloat v) { return reinterpret_cast<vint>(v); }
inline vfloat as_float(vint v) { return reinterpret_cast<vfloat>(v); }
inline vint broadcast_int(int32_t x) { return x - vint{}; }
inline vfloat abs(vfloat v) { return as_float(as_int(v) & 0x7fffffff); }
inline double abs(double v) { return std::fabs(v); }

// ln 2 in two parts; the first has 16 bits, so a product with an exponent is exact.
constexpr float kLn2High = 0x1.62e4p-1f;
constexpr float kLn2Low = 0x1.7f7d1cp-20f;

BIFLOW_INLINE vfloat exp_polynomial(vfloat r) {  // on [-ln 2 / 2, ln 2 / 2]
  vfloat p = r * 0.00138145394f + 0.00836874545f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  return p * (r * r) + r + 1.f;
}

BIFLOW_INLINE vfloat log_polynomial(vfloat f) {  // (log(1 + f) - f) / f^2 on [-1/4, 1/2]
  vfloat p = f * -0.0450800285f + 0.104643337f;
  p = p * f - 0.13162069f;
  p = p * f + 0.144785017f;
  p = p * f - 0.16647245f;
  p = p * f + 0.199908465f;
  p = p * f - 0.250000983f;
  p = p * f + 0.333334506f;
  return p * f - 0.5f;
}

#if defined(__AVX512F__)

BIFLOW_INLINE vfloat reciprocal(vfloat x) {  // of ordinary numbers, within 1 ulp: a division takes longer
  const vfloat r = _mm512_maskz_rcp14_ps(0xffff, x);
  return r * (2.f - x * r);
}

BIFLOW_INLINE vfloat exp(vfloat x) {
  // beyond these limits the result is inf or 0 all the same; min and max return their second operand for a NaN
  x = _mm512_maskz_max_ps(0xffff, broadcast(-104.f), _mm512_maskz_min_ps(0xffff, broadcast(89.f), x));
  const vfloat n = _mm512_maskz_roundscale_ps(0xffff, x * 0x1.715476p0f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(0xffff, exp_polynomial(x - n * kLn2High - n * kLn2Low), n);
}

BIFLOW_INLINE vfloat log(vfloat x) {
  // these give log 0 = -inf, log inf = inf and NaN for negative numbers by themselves
  const vfloat m = _mm512_maskz_getmant_ps(0xffff, x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const vfloat exponent = _mm512_maskz_getexp_ps(0xffff, x);
  const vfloat e = m < 1.f ? exponent + 1.f : exponent;
  const vfloat f = m - 1.f;
  return e * kLn2High + (f + (log_polynomial(f) * (f * f) + e * kLn2Low));
}

#else

BIFLOW_INLINE vfloat reciprocal(vfloat x) { return 1.f / x; }

BIFLOW_INLINE vfloat exp(vfloat x) {
  // beyond these the result is inf or 0 all the same, and 2^n below stays representable in two halves; NaN stays
  x = x > 89.f ? broadcast(89.f) : x;
  x = x < -104.f ? broadcast(-104.f) : x;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer and leaves that integer in the low bits
  const vfloat shifted = x * 0x1.715476p0f + magic;
  const vint n = as_int(shifted) - as_int(broadcast(magic));
  const vfloat nf = shifted - magic;
  const vint half = n >> 1;
  return exp_polynomial(x - nf * kLn2High - nf * kLn2Low) * as_float((half + 127) << 23) *
         as_float((n - half + 127) << 23);
}

BIFLOW_INLINE vfloat log(vfloat x) {
  const vint tiny = x < 0x1p-126f;
  const vfloat scaled = tiny ? x * 0x1p23f : x;
  const vint bits = as_int(scaled);
  const vint e = (bits - 0x3f400000) >> 23;  // exponent that leaves the mantissa in [3/4, 3/2)
  const vfloat f = as_float(bits - (e << 23)) - 1.f;
  const vfloat ef = __builtin_convertvector(tiny ? e - 23 : e, vfloat);
  const vfloat r = ef * kLn2High + (f + (log_polynomial(f) * (f * f) + ef * kLn2Low));
  const float inf = std::numeric_limits<float>::infinity();
  const vfloat outside = x == 0.f ? broadcast(-inf) : broadcast(std::numeric_limits<float>::quiet_NaN());
  return x > 0.f ? (x == inf ? x : r) : outside;
}

#endif

BIFLOW_INLINE vfloat log1p(vfloat x) {
  const vfloat u = x + 1.f;
  const vfloat lost = (x - (u - 1.f)) / u;  // what rounding 1 + x dropped, to first order
  const vint finite = (u > 0.f) & (u < std::numeric_limits<float>::infinity());
  return log(u) + (finite ? lost : broadcast(0.f));
}

BIFLOW_INLINE vfloat log1p_unit(vfloat x) {  // for x in [0, 1], NaN propagates
  const vint upper = x > 0.5f;
  const vfloat f = upper ? x * 0.5f - 0.5f : x;  // 1 + f = (1 + x) / 2
  return f + (log_polynomial(f) * (f * f) + (upper ? broadcast(kLn2Low) : vfloat{})) +
         (upper ? broadcast(kLn2High) : vfloat{});
}

BIFLOW_INLINE vfloat tanh(vfloat x) {
  const vfloat w = x * x;
  vfloat p = w * -0.00570499245f + 0.0206390917f;
  p = p * w - 0.0537397154f;
  p = p * w + 0.133314416f;
  p = p * w - 0.333332807f;
  const vfloat small = p * (w * x) + x;
  const vfloat magnitude = abs(x);
  const vfloat large = 1.f - 2.f / (exp(magnitude + magnitude) + 1.f);
  const vint sign = as_int(x) & static_cast<int32_t>(0x80000000);
  return magnitude < 0.625f ? small : as_float(as_int(large) | sign);
}

inline double reciprocal(double x) { return 1 / x; }
inline double exp(double x) { return std::exp(x); }
inline double log(double x) { return std::log(x); }
inline double log1p(double x) { return std::log1p(x); }
inline double log1p_unit(double x) { return std::log1p(x); }
inline double tanh(double x) { return std::tanh(x); }

template <class V>
BIFLOW_INLINE V sigmoid(V x) {
  const V e = exp(-abs(x));
  const V p = reciprocal(constant<V>(1) + e);
  return x < constant<V>(0) ? e * p : p;
}

}  // namespace biflow::cpu::BIFLOW_ISA
