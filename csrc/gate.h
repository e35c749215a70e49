// The gate of a SwiGLU and its gradient: silu(a) b of the halves [a | b] of a row, silu(a) = a / (1 + exp(-a)).
#pragma once

#include <cstdint>

#include "affine.h"

namespace biflow {

// All tensors contiguous and of one dtype, f32, bf16 or f16.
struct GateParams {
  int64_t rows = 0, channels = 0;  // channels: of the result
  DType type = DType::f32;
  const void* m = nullptr;       // (rows, 2 channels)
  void* y = nullptr;             // (rows, channels)    [forward]
  const void* grad_y = nullptr;  // (rows, channels)    [backward]
  void* grad_m = nullptr;        // (rows, 2 channels)  [backward]
};

namespace cpu {
// The rows [begin, end).
BIFLOW_CPU_KERNEL(gate, (const GateParams& p, int64_t begin, int64_t end), (p, begin, end))
BIFLOW_CPU_KERNEL(gate_backward, (const GateParams& p, int64_t begin, int64_t end), (p, begin, end))
}  // namespace cpu
}  // namespace biflow
