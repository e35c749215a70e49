// The exact sequential inverse of one flow block: T steps of a causal transformer over a static KV cache.
// Maths: biflow/ops/decode_block.py.
#pragma once

#include "affine.h"
#include "block.h"
#include "cpu/crew.h"

namespace biflow {

// One call: all T tokens of B samples.
struct DecodeBlockParams {
  BlockShape shape;
  AffineOptions affine;  // layout, scale, clip, flip; `causal` is not read. With shift_only: exp, scale 1
  BlockCondition condition;
  int64_t B = 0;
  const float* z = nullptr;       // (B, T, D)
  const float* packed = nullptr;  // 64-byte aligned
  float* x = nullptr;             // (B, T, D); may be z
};

namespace cpu {
// Floats of scratch that one crew needs.
BIFLOW_MATRIX_KERNEL(decode_block_scratch, (const DecodeBlockParams& p, const Schedule& s, int64_t* floats),
                     (p, s, floats))
// The share of one worker of s.workers(). A sample's result is the same whatever the schedule.
BIFLOW_MATRIX_KERNEL(decode_block, (const DecodeBlockParams& p, const Schedule& s, int worker), (p, s, worker))
}  // namespace cpu
}  // namespace biflow
