// Norms and gates of a transformer layer, over rows of floats.
#pragma once

#include "cpu/simd_math.h"

namespace biflow::cpu::BIFLOW_ISA {

// P(X <= x), X normal. With u = |x| and t = 1 / (1 + 0.23 u): P(X <= -u) = exp(-u^2 / 2) q(t), q within 5e-8 of exact,
// relatively (minimax fit on [0, 14.5]), so that neither tail cancels.
BIFLOW_INLINE vfloat normal_cdf(vfloat x) {
  const vfloat t = reciprocal(min(abs(x), broadcast(20.f)) * 0.23f + 1.f);
  vfloat q = t * -0.07848399f + 0.2904981f;
  q = q * t - 0.2783093f;
  q = q * t + 0.3016935f;
  q = q * t - 0.033082787f;
  q = q * t + 0.11958858f;
  q = q * t + 0.0857422f;
  q = q * t + 0.09238165f;
  const vfloat tail = exp(-0.5f * (x * x)) * (q * t - 2.79705e-05f);
  return x < 0.f ? tail : 1.f - tail;
}

BIFLOW_INLINE vfloat gelu(vfloat v) { return v * normal_cdf(v); }

// Within 7e-5 of gelu, a fraction of the time: for results that are rounded to bf16 (minimax fit of x P(X <= x) with
// P = 1/2 + x p(x^2) on [-4.25, 4.25], where it meets 0 and 1).
BIFLOW_INLINE vfloat gelu_coarse(vfloat v) {
  const vfloat x = min(max(v, broadcast(-4.25f)), broadcast(4.25f)), s = x * x;
  vfloat p = s * 6.764235e-11f - 6.334989e-09f;
  p = p * s + 2.6090746e-07f;
  p = p * s - 6.298536e-06f;
  p = p * s + 0.00010089234f;
  p = p * s - 0.0011575401f;
  p = p * s + 0.009996324f;
  p = p * s - 0.06667295f;
  p = p * s + 0.39911422f;
  return v * (0.5f + x * p);
}

template <class F>
inline float sum_row(const float* x, int n, F&& f) {  // sum of f(x), in a fixed order
  vfloat sum = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += f(load(x + i));
  if (i < n) {
    vfloat last = {};
    store_partial(reinterpret_cast<float*>(&last), f(load_partial(x + i, n - i)), n - i);
    sum += last;
  }
  return reduce_add(sum);
}

// y may be of a narrower type; its padding up to whole vectors comes out as 0 (weight and bias are padded with 0)
template <class Value>
inline void layer_norm(const float* x, const float* weight, const float* bias, Value* y, int n) {
  const float mean = sum_row(x, n, [](vfloat v) { return v; }) / n;
  const float variance = sum_row(x, n, [&](vfloat v) { return (v - mean) * (v - mean); }) / n;
  const float scale = 1.f / std::sqrt(variance + 1e-5f);
  for (int i = 0; i < n; i += kLanes) store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

template <class Value>
inline void rms_norm(const float* x, const float* weight, Value* y, int n) {
  const float scale = 1.f / std::sqrt(sum_row(x, n, [](vfloat v) { return v * v; }) / n + 1e-6f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i) * scale * load_partial(weight + i, n - i), n - i);
}

}  // namespace biflow::cpu::BIFLOW_ISA
