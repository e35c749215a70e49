// The raw affine parameters of a window of tokens of one flow block, in one parallel pass over packed weights.
// Maths: biflow/ops/block_params.py.
#pragma once

#include "affine.h"
#include "block.h"
#include "cpu/crew.h"

namespace biflow {

struct BlockParamsParams {
  BlockShape shape;
  AffineOptions affine;  // layout and flip are read
  BlockCondition condition;
  int64_t B = 0;
  int start = 0, stop = 0;        // the window, in block order: tokens start <= n < stop
  const float* x = nullptr;       // (B, T, D) in data order
  const float* packed = nullptr;  // 64-byte aligned
  float* raw = nullptr;           // (B, T, 2D or D) in data order; the window's rows are written
  // Keys and values of every position, [B, or 2 B with guidance][L H CacheShape::size()], 64-byte aligned: those before
  // the window are read, those that the window's parameters come from are written. Null: the window starts at 0 and
  // keeps nothing.
  float* cache = nullptr;
};

namespace cpu {
BIFLOW_MATRIX_KERNEL(block_params_scratch, (const BlockParamsParams& p, const Schedule& s, int64_t* floats),
                     (p, s, floats))
// The share of one worker of s.workers(). A sample's result is the same whatever the schedule.
BIFLOW_MATRIX_KERNEL(block_params, (const BlockParamsParams& p, const Schedule& s, int worker), (p, s, worker))
}  // namespace cpu
}  // namespace biflow
