// Attention of many queries, per head: o = softmax(scale q k^T) v, with what a transformer layer does to q and k
// before: RMSNorm over the channels of a head, rotary embedding. On a GPU only; elsewhere torch's own attention is
// used.
#pragma once

#include <cstdint>

namespace biflow {

// Tokens of every sample and head; strides in elements. A token's channels lie side by side, 16-byte aligned.
struct HeadsView {
  const void* data = nullptr;
  int64_t sample = 0, head = 0, token = 0;
};

struct AttentionParams {
  int64_t B = 0, H = 0;  // samples, heads
  int Tq = 0, Tk = 0;    // queries, keys, below 2^30
  int d = 0;             // channels of a head: 32, 64 or 128
  bool bf16 = true;      // q, k, v and out; false: fp16

  HeadsView q;                 // (B, H, Tq, d)
  HeadsView k, v;              // (B, H, Tk, d)
  void* out = nullptr;         // (B, Tq, H, d) contiguous
  const bool* mask = nullptr;  // (B, Tk) contiguous; false: the key does not count. null: all do
  bool causal = false;         // query i sees keys <= Tk - Tq + i; Tq <= Tk
  float scale = 1;             // of the logits, > 0

  // q and k before the product, in this order; rounded once, after both. The same prefix for q and k.
  const float* q_norm = nullptr;  // (d,) weight of q's RMSNorm, null: none
  const float* k_norm = nullptr;  // (d,) of k's
  float eps = 0;
  const float* cos = nullptr;  // (T - prefix, d / 2) angles of the channel pairs (2i, 2i + 1), null: none
  const float* sin = nullptr;
  int prefix = 0;  // first tokens, not rotated
};

// How the work is divided. A block takes whole query tiles, of 16 row_tiles warps queries, of one head; shared memory
// holds `stages` tiles of 64 keys and their values. If those are all keys, a block may take several query tiles.
struct AttentionPlan {
  int row_tiles = 1;  // 16 queries each, of a warp: 1 or 2 (d = 128: 1)
  int warps = 4;      // of a block: 1, 2, 4 or 8
  int blocks = 1;     // of a head, at most its query tiles; one each where the keys do not all fit
  int stages = 1;     // all key tiles, or 3
};

namespace cuda {
// For the current device. Tk may be 0; B, H, Tq must not be.
AttentionPlan attention_plan(const AttentionParams& p);
// cudaErrorInvalidValue for a plan that does not suit p.
int attention_forward(const AttentionParams& p, const AttentionPlan& plan, void* stream);
}  // namespace cuda
}  // namespace biflow
