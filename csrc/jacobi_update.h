// One step of the fixed-point inverse on a window of tokens: x = z sigma + b from raw parameters, in place, and how far
// it moved. Maths: biflow/ops/jacobi_update.py.
#pragma once

#include <cstdint>

#include "affine.h"

namespace biflow {

struct JacobiUpdateParams {
  AffineOptions affine;  // layout, scale, clip, flip; `causal` is not read: raw belongs to the token
  bool shift_only = false;
  int64_t B = 0, T = 0, D = 0;
  int64_t start = 0, stop = 0;  // the window, in block order: tokens start <= n < stop
  float* x = nullptr;           // (B, T, D) in data order
  const float* z = nullptr;     // (B, T, D)
  const float* raw = nullptr;   // (B, T, 2D or D) in data order
  // (2, B): the largest |new x - x| / max(1, |new x|) and |G(x) - z| / max(1, |z|), G(x) = (x - b) / sigma, over the
  // window's tokens and channels; NaN where anything is NaN or infinite
  float* moved = nullptr;
};

namespace cpu {
// The samples [begin, end).
BIFLOW_CPU_KERNEL(jacobi_update, (const JacobiUpdateParams& p, int64_t begin, int64_t end), (p, begin, end))
}  // namespace cpu

namespace cuda {
// Enqueues on the stream (a cudaStream_t) of the current device and returns a cudaError_t. B > 0; D <= 2^29.
int jacobi_update(const JacobiUpdateParams& p, void* stream);
}  // namespace cuda
}  // namespace biflow
