// The elementwise maths of the affine coupling for one float or double: clip, scale map, both directions and their
// gradients. Options are alike for a whole launch, so a branch on one is never divergent.
#pragma once

#include <cmath>
#include <type_traits>

#include "affine.h"
#include "arch/arch.cuh"

namespace biflow::cuda {

// Full-precision library functions, at most 2 ulp, except where a branch of theirs costs more than the function.
BIFLOW_DEVICE float exponential(float x) { return expf(x); }
BIFLOW_DEVICE double exponential(double x) { return exp(x); }
BIFLOW_DEVICE float logarithm(float x) { return logf(x); }
BIFLOW_DEVICE double logarithm(double x) { return log(x); }
BIFLOW_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
BIFLOW_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
BIFLOW_DEVICE float absolute(float x) { return fabsf(x); }
BIFLOW_DEVICE double absolute(double x) { return fabs(x); }

// 1 / x to 2 ulp, subnormals included; 0 above 2^126.
BIFLOW_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
BIFLOW_DEVICE double reciprocal(double x) { return 1 / x; }

// log(1 + x) for x in [0, 1], 1.4 ulp. In a sum of logarithms what is left of an error is its mean, here below 2^-29 in
// every part of the interval (the polynomial is that of csrc/cpu/simd_math.h).
BIFLOW_DEVICE float log_1p_unit(float x) {
  const bool upper = x > 0.5f;
  const float f = upper ? x * 0.5f - 0.5f : x;  // 1 + f = (1 + x) / 2
  float p = f * -0.0450800285f + 0.104643337f;
  p = p * f - 0.13162069f;
  p = p * f + 0.144785017f;
  p = p * f - 0.16647245f;
  p = p * f + 0.199908465f;
  p = p * f - 0.250000983f;
  p = p * f + 0.333334506f;
  p = p * f - 0.5f;
  const float high = upper ? 0x1.62e4p-1f : 0.0f, low = upper ? 0x1.7f7d1cp-20f : 0.0f;  // log 2
  return f + (p * (f * f) + low) + high;
}
BIFLOW_DEVICE double log_1p_unit(double x) { return log1p(x); }

// The clip of raw params in two steps, so that what value and slope share is computed once: prepare, which replaces the
// raw values, then both of what it left. No branches in the second: the compiler would make one for each element.
template <class S>
class Clipping {
 public:
  BIFLOW_DEVICE Clipping(const AffineOptions& o, bool clipped)
      : kind_(clipped ? o.clip : Clip::none),
        inverse_(1 / static_cast<S>(o.clip_value)),
        bound_(kind_ == Clip::hard ? static_cast<S>(o.clip_value) : S(INFINITY)),
        factor_(kind_ == Clip::tanh ? static_cast<S>(o.clip_value) : S(1)),
        curve_(kind_ == Clip::tanh ? S(1) : S(0)),
        outside_(kind_ == Clip::tanh ? S(NAN) : S(0)) {}

  BIFLOW_DEVICE bool any() const { return kind_ != Clip::none; }

  template <int n>
  BIFLOW_DEVICE void prepare(S (&raw)[n]) const {
    if (kind_ != Clip::tanh) return;
#pragma unroll
    for (int i = 0; i < n; ++i) raw[i] = hyperbolic_tangent(raw[i] * inverse_);
  }
  BIFLOW_DEVICE S value(S p) const {
    p *= factor_;
    p = p > bound_ ? bound_ : p;  // NaN compares false and stays
    return p < -bound_ ? -bound_ : p;
  }
  // d value / d raw; hard: 1 on the closed interval [-c, c], as torch.clamp has it.
  BIFLOW_DEVICE S slope(S p) const { return absolute(p) <= bound_ ? 1 - curve_ * p * p : outside_; }

  template <int n>
  BIFLOW_DEVICE void apply(S (&raw)[n]) const {
    if (!any()) return;
    prepare(raw);
#pragma unroll
    for (int i = 0; i < n; ++i) raw[i] = value(raw[i]);
  }

 private:
  Clip kind_;
  S inverse_, bound_, factor_;
  S curve_, outside_;  // tanh: 1, and NaN for a NaN
};

template <class S>
struct Scale {
  S factor;    // 1 / sigma for encode, sigma for decode
  S log;       // log sigma
  S gradient;  // d log sigma / da
};

// sigma of the clipped a. What a caller does not use of the result costs nothing.
template <ScaleMap kMap, class S>
BIFLOW_DEVICE Scale<S> scale_map(S a, bool encode) {
  if constexpr (kMap == ScaleMap::exp) {
    return {exponential(encode ? -a : a), a, S(1)};
  } else if constexpr (kMap == ScaleMap::softplus) {
    const S t = a + S(0.541324854612918);  // log(e - 1): sigma(0) = 1
    const S e = exponential(-absolute(t));
    const S sigma = (t > 0 ? t : S(0)) + log_1p_unit(e);
    const S inverse = reciprocal(sigma), r = reciprocal(1 + e);
    // left of -37 softplus(t) = exp(t) to a double's last bit (of -17 to a float's), and the quotients become 0 / 0
    const bool tail = t < (sizeof(S) == 8 ? -37 : -17);
    return {encode ? inverse : sigma, tail ? t : logarithm(sigma), tail ? S(1) : (t < 0 ? e * r : r) * inverse};
  } else {
    const S t = a + 2;
    const S e = exponential(-absolute(t));
    const S p = 1 / (1 + e), q = e * p;
    const S sigma = (t < 0 ? q : p) + S(1e-3), inverse = reciprocal(sigma);
    return {encode ? inverse : sigma, logarithm(sigma), p * q * inverse};
  }
}

// z = (x - b) / sigma or x = z sigma + b, in place of v, where `on`; a and b clipped. Returns the sum of -log sigma
// there, in the elements' order.
template <ScaleMap kMap, class S, int n>
BIFLOW_DEVICE S forward(bool encode, const S (&a)[n], const S (&b)[n], S (&v)[n], const bool (&on)[n]) {
  S sum = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Scale<S> s = scale_map<kMap>(a[i], encode);
    const S encoded = (v[i] - b[i]) * s.factor, decoded = v[i] * s.factor + b[i];
    v[i] = !on[i] ? v[i] : encode ? encoded : decoded;
    sum -= on[i] ? s.log : S(0);
  }
  return sum;
}

// The gradients of the raw a and b, and in the place of g that of the input v; g that of the output, a and b prepared
// if clipped.
template <ScaleMap kMap, bool kClipped, class S, int n>
BIFLOW_DEVICE void backward(bool encode, const Clipping<S>& clip_a, const Clipping<S>& clip_b, S (&a)[n], S (&b)[n],
                            const S (&v)[n], S (&g)[n], S grad_logdet, const bool (&on)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Scale<S> s = scale_map<kMap>(kClipped ? clip_a.value(a[i]) : a[i], encode);
    const S to_input = g[i] * s.factor, shift = kClipped ? clip_b.value(b[i]) : b[i];
    const S moved = to_input * (encode ? v[i] - shift : v[i]);
    const S to_a = (encode ? -moved : moved) - grad_logdet, to_b = encode ? -to_input : g[i];
    a[i] = to_a * s.gradient * (kClipped ? clip_a.slope(a[i]) : S(1));
    b[i] = to_b * (kClipped ? clip_b.slope(b[i]) : S(1));
    g[i] = on[i] ? to_input : g[i];
  }
}

// Calls f with the scale map as an integral_constant.
template <class F>
BIFLOW_DEVICE void with_scale_map(ScaleMap map, F&& f) {
  if (map == ScaleMap::exp)
    f(std::integral_constant<ScaleMap, ScaleMap::exp>());
  else if (map == ScaleMap::softplus)
    f(std::integral_constant<ScaleMap, ScaleMap::softplus>());
  else
    f(std::integral_constant<ScaleMap, ScaleMap::sigmoid>());
}

}  // namespace biflow::cuda
