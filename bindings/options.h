// What the bindings of several ops parse: enums by name, the options of the affine map.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <string>

#include "affine.h"

namespace biflow {

// The enumerator of `name`, by its place in `names`; op and what name the argument in the error.
template <class Enum>
Enum parse(const char* op, const char* what, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* n : names) {
    if (name == n) return static_cast<Enum>(i);
    ++i;
  }
  STD_TORCH_CHECK(false, op, ": unknown ", what, " ", name);
  return Enum{};
}

inline DType dtype_of(const char* op, const char* what, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, op, ": ", what, " must be float32, bfloat16, float16 or float64");
  }
  return DType::f32;
}

// A number that kernels of fp32 take: as fp32 it must be finite, at least 0, and above 0 if `positive`.
inline float narrowed(const char* op, const char* what, double value, bool positive) {
  const float narrow = static_cast<float>(value);
  STD_TORCH_CHECK(std::isfinite(narrow) && (positive ? narrow > 0 : narrow >= 0), op, ": ", what,
                  " must be finite and ", positive ? "> 0" : ">= 0", " as float32, got ", value);
  return narrow;
}

inline AffineOptions parse_affine(const char* op, const std::string& layout, const std::string& scale,
                                  const std::string& clip, double clip_value, const std::string& clip_on, bool flip) {
  AffineOptions o;
  o.layout = parse<Layout>(op, "layout", layout, {"scale_shift", "shift_scale", "interleaved"});
  o.scale = parse<ScaleMap>(op, "scale", scale, {"exp", "softplus", "sigmoid"});
  o.clip = parse<Clip>(op, "clip", clip, {"none", "hard", "tanh"});
  if (o.clip != Clip::none) narrowed(op, "clip_value", clip_value, true);
  o.clip_value = clip_value;
  o.clip_on = parse<ClipOn>(op, "clip_on", clip_on, {"both", "scale"});
  o.flip = flip;
  return o;
}

}  // namespace biflow
