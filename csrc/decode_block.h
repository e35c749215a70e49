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

namespace cuda {
// How a call is divided on a GPU. A sample's bits do not depend on row_tiles and blocks, nor on the samples beside it;
// the other fields change the order of sums.
struct DecodePlan {
  bool persistent = false;     // all steps in one cooperative launch; otherwise one launch a phase
  int row_tiles = 1;           // of 16 sequences, which a block multiplies at once: 1, 2 or 4
  int blocks = 1;              // of the grid, at least one for each 16 row_tiles sequences
  int splits = 1;              // blocks that share the tokens of a sequence and head in attention; if more than one,
                               // head_dim % 8 == 0 and row_tiles == 1
  int warps = 8;               // that share those of a split: 1, 2, 4 or 8
  bool norm_in_place = false;  // every block normalises for itself, one phase less; row_tiles == 1
};

// What a plan depends on of a GPU.
struct DecodeMachine {
  int multiprocessors = 0;
  size_t shared = 0;         // bytes of shared memory that a block may have
  bool cooperative = false;  // whether it takes cooperative launches
};
DecodeMachine decode_machine();  // the current device
// The fastest, by estimates and by what an H200 showed. p.packed is for Target::cuda; B >= 1, B and T below 2^20.
DecodePlan decode_plan(const DecodeBlockParams& p, const DecodeMachine& machine);
// Bytes of shared memory that a block needs.
size_t decode_shared_bytes(const DecodeBlockParams& p, const DecodePlan& plan);
// Scratch memory in 32-bit words: how many, and where the buffers of csrc/cuda/decode_block_state.cuh start. Some are
// empty.
struct DecodeBuffers {
  int64_t words = 0, x = 0, y = 0, o = 0, h = 0, partial = 0, lse = 0, qkv = 0, raw = 0, cache = 0;
};
DecodeBuffers decode_buffers(const DecodeBlockParams& p, const DecodePlan& plan);
// Enqueues on the stream (a cudaStream_t) of the current device; returns a cudaError_t. One launch a phase in place of
// a cooperative launch whose blocks could not all be resident: the same bits. packed and workspace are 16-byte aligned,
// added and null_added 8-byte aligned. phases: to stop after so many of them, where they are launches of their own;
// negative: all.
int decode_block(const DecodeBlockParams& p, const DecodePlan& plan, float* workspace, int64_t phases, void* stream);

// One tensor of the state_dict into packed memory, which was zero.
int pack_source(const PackedSource& to, const float* from, float* packed, void* stream);
}  // namespace cuda
}  // namespace biflow
