// The elementwise maths of the affine coupling, over a vector of floats or one double. Whatever a caller does not use
// of a result costs nothing: the compiler removes it.
#pragma once

#include <type_traits>

#include "affine.h"
#include "cpu/simd_math.h"

namespace biflow::cpu::BIFLOW_ISA {

template <Clip kClip, class V>
BIFLOW_INLINE V clip(V a, V c) {
  if constexpr (kClip == Clip::hard) {
    a = a > c ? c : a;  // NaN compares false and stays
    return a < -c ? -c : a;
  } else if constexpr (kClip == Clip::tanh) {
    return c * tanh(a * (constant<V>(1) / c));
  } else {
    return a;
  }
}

// d clip / da. Hard: 1 on the closed interval [-c, c], as torch.clamp has it.
template <Clip kClip, class V>
BIFLOW_INLINE V clip_gradient(V a, V c) {
  const V one = constant<V>(1);
  if constexpr (kClip == Clip::hard) {
    return abs(a) <= c ? one : constant<V>(0);
  } else if constexpr (kClip == Clip::tanh) {
    const V t = tanh(a * (one / c));
    return one - t * t;
  } else {
    return one;
  }
}

template <class V>
struct Scale {
  V sigma;
  V inverse;       // 1 / sigma
  V log;           // log sigma
  V log_gradient;  // d log sigma / da, a after the clip
};

template <ScaleMap kMap, class V>
BIFLOW_INLINE Scale<V> scale_map(V a) {
  const V one = constant<V>(1), zero = constant<V>(0);
  if constexpr (kMap == ScaleMap::exp) {
    return {exp(a), exp(-a), a, one};
  } else if constexpr (kMap == ScaleMap::softplus) {
    const V t = a + constant<V>(0.541324854612918);  // log(e - 1): sigma(0) = 1
    const V e = exp(-abs(t));
    const V s = (t > zero ? t : zero) + log1p_unit(e);
    const V r = one / (one + e);
    // left of -37 softplus(t) = exp(t) to a double's last bit (of -17 to a float's), and the quotients become 0 / 0
    const auto tail = t < constant<V>(std::is_same_v<V, double> ? -37 : -17);
    return {s, one / s, tail ? t : log(s), tail ? one : (t < zero ? e * r : r) / s};
  } else {
    const V u = a + constant<V>(2);
    const V e = exp(-abs(u));
    const V p = one / (one + e), q = e * p;
    const V s = (u < zero ? q : p) + constant<V>(1e-3);
    return {s, one / s, log(s), p * q / s};
  }
}

// Calls f(integral_constant<ScaleMap>, integral_constant<Clip>, bool_constant<clip b too>) for the options given.
template <class F>
inline void with_affine_options(const AffineOptions& o, F&& f) {
  const auto with_map = [&](auto map) {
    using std::integral_constant;
    const bool both = o.clip_on == ClipOn::both;
    if (o.clip == Clip::none) {
      f(map, integral_constant<Clip, Clip::none>(), std::false_type());
    } else if (o.clip == Clip::hard) {
      both ? f(map, integral_constant<Clip, Clip::hard>(), std::true_type())
           : f(map, integral_constant<Clip, Clip::hard>(), std::false_type());
    } else {
      both ? f(map, integral_constant<Clip, Clip::tanh>(), std::true_type())
           : f(map, integral_constant<Clip, Clip::tanh>(), std::false_type());
    }
  };
  switch (o.scale) {
    case ScaleMap::exp:
      return with_map(std::integral_constant<ScaleMap, ScaleMap::exp>());
    case ScaleMap::softplus:
      return with_map(std::integral_constant<ScaleMap, ScaleMap::softplus>());
    case ScaleMap::sigmoid:
      return with_map(std::integral_constant<ScaleMap, ScaleMap::sigmoid>());
  }
}

// x = z sigma(clip a) + clip b over n channels: a, b are raw. The decode direction for rows that are already float.
inline void affine_decode_row(const AffineOptions& o, const float* a, const float* b, const float* z, float* x,
                              int64_t n) {
  with_affine_options(o, [&](auto map, auto kind, auto both) {
    const vfloat c = broadcast(static_cast<float>(o.clip_value));
    const auto step = [&](vfloat va, vfloat vb, vfloat vz) {
      if constexpr (both.value) vb = clip<kind.value>(vb, c);
      return vz * scale_map<map.value>(clip<kind.value>(va, c)).sigma + vb;
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, step(load(a + i), load(b + i), load(z + i)));
    if (const int rest = static_cast<int>(n - i))
      store_partial(x + i, step(load_partial(a + i, rest), load_partial(b + i, rest), load_partial(z + i, rest)), rest);
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
