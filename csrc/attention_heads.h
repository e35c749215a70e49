// The heads of a layer's packed projection: q, k, v apart, q and k normalised over their channels (RMSNorm) and turned
// by the rotary embedding, and the gradients. Maths: biflow/ops/attention.py.
#pragma once

#include <cstdint>

#include "affine.h"

namespace biflow {

struct HeadsParams {
  int64_t B = 0, T = 0, H = 0, d = 0, prefix = 0;  // the first `prefix` tokens are not turned
  float eps = 0;
  DType type = DType::f32;                     // of qkv, the heads and their gradients: f32, bf16 or f16
  const void* qkv = nullptr;                   // (B, T, 3, H, d) contiguous
  const float* norm[2] = {};                   // (d,) weights of q's and k's norm; null: no norm
  const float *cos = nullptr, *sin = nullptr;  // (T - prefix, d / 2); null: not turned
  void* head[3] = {};                          // q, k, v (B, T, H, d) contiguous   [forward]

  const void* grad_head[3] = {};  // q, k, v (B, T, H, d); any strides but the last, 1       [backward]
  int64_t stride[3][3] = {};      // of their B, T, H                                         [backward]
  void* grad_qkv = nullptr;       // as qkv                                                   [backward]
  float* partial = nullptr;       // (chunks, 2, d): of the gradients of both norms' weights  [backward]

  // A chunk of tokens is the unit of work. It depends on the shape alone, so sums are the same for any number of
  // threads. (Inlined by force: a copy shared by the objects of all instruction sets would run on the wrong CPU.)
  __attribute__((always_inline)) int64_t tokens_per_chunk() const {
    constexpr int64_t kMost = 64, kLeast = 32;  // chunks, tokens in one
    const int64_t n = (B * T + kMost - 1) / kMost;
    return n > kLeast ? n : kLeast;
  }
  __attribute__((always_inline)) int64_t chunks() const {
    return (B * T + tokens_per_chunk() - 1) / tokens_per_chunk();
  }
};

namespace cpu {
// The chunks [begin, end) of p.chunks().
BIFLOW_CPU_KERNEL(heads, (const HeadsParams& p, int64_t begin, int64_t end), (p, begin, end))
BIFLOW_CPU_KERNEL(heads_backward, (const HeadsParams& p, int64_t begin, int64_t end), (p, begin, end))
// Adds the partial sums of all chunks, in order; which: 0 q, 1 k.
BIFLOW_CPU_KERNEL(heads_norm_gradient, (const HeadsParams& p, int which, float* grad), (p, which, grad))
}  // namespace cpu
}  // namespace biflow
