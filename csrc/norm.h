// LayerNorm and RMSNorm of rows, alone or after the residual addition, and their gradients: y = (h - m) / sqrt(s + eps)
// weight + bias, h = x + residual; m and s: the row's mean and variance, or 0 and the mean of its squares.
#pragma once

#include <cstdint>

#include "affine.h"
#include "block.h"

namespace biflow {

// All tensors contiguous, (rows, channels) but for weight and bias (channels,). f32, bf16 or f16 each.
struct NormParams {
  int64_t rows = 0, channels = 0;
  Norm kind = Norm::layernorm;
  float eps = 0;
  const float *weight = nullptr, *bias = nullptr;  // bias may be null
  const void *x = nullptr, *residual = nullptr;    // residual null: h = x
  void *h = nullptr, *y = nullptr;                 // h null without residual; y is of h as rounded to its dtype
  DType x_type = DType::f32, residual_type = DType::f32, h_type = DType::f32, y_type = DType::f32;
};

struct NormGradParams {
  int64_t rows = 0, channels = 0;
  Norm kind = Norm::layernorm;
  float eps = 0;
  const float* weight = nullptr;
  const void *grad_y = nullptr, *grad_h = nullptr, *h = nullptr;  // grad_h, of h's dtype, may be null
  void *grad_x = nullptr, *narrow = nullptr;  // gradient of h in its dtype; null or the same in another dtype
  DType y_type = DType::f32, h_type = DType::f32, narrow_type = DType::f32;
  float* partial = nullptr;  // (chunks, 2, channels): of the gradients of weight and bias

  // A chunk of rows is the unit of work. It depends on the shape alone, so sums are the same for any number of threads.
  // (Inlined by force: a copy shared by the objects of all instruction sets would run on the wrong CPU.)
  __attribute__((always_inline)) int64_t rows_per_chunk() const {
    constexpr int64_t kMost = 64, kLeast = 32;  // chunks, rows in one
    const int64_t n = (rows + kMost - 1) / kMost;
    return n > kLeast ? n : kLeast;
  }
  __attribute__((always_inline)) int64_t chunks() const { return (rows + rows_per_chunk() - 1) / rows_per_chunk(); }
};

namespace cpu {
// The rows [begin, end).
BIFLOW_CPU_KERNEL(norm, (const NormParams& p, int64_t begin, int64_t end), (p, begin, end))
// The chunks [begin, end) of p.chunks().
BIFLOW_CPU_KERNEL(norm_backward, (const NormGradParams& p, int64_t begin, int64_t end), (p, begin, end))
// Adds the partial sums of all chunks, in order; grad_bias may be null.
BIFLOW_CPU_KERNEL(norm_weight_gradients, (const NormGradParams& p, float* grad_weight, float* grad_bias),
                  (p, grad_weight, grad_bias))
}  // namespace cpu
}  // namespace biflow
