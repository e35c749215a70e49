// Attention of up to 16 queries of one sequence and head over cached keys and values, by AMX: the cache's words are the
// tiles that the products want (block.h). Queries and softmax weights are rounded to bf16, sums are fp32.
#pragma once

#ifdef __AMX_BF16__

#include "cpu/attention_step.h"
#include "cpu/linear_bf16.h"

namespace biflow::cpu::BIFLOW_ISA {

class TileAttention {
 public:
  static constexpr bool kWholeTiles = true;
  static constexpr int kRows = Bf16::kRows;  // queries at a time

  static int64_t scratch(const CacheShape& c) {  // floats
    return kRows * (c.padded_tokens() * 3 / 2 + round_up(c.d, kTileDepth) * 3 / 2);
  }

  explicit TileAttention(const CacheShape& c) : c_(c) {}

  // As VectorAttention, which does it for heads that are no whole tiles. The session has tiles of `count` rows, or
  // of 16. What the cache holds for tokens to come must be finite.
  void attend_all(const float* cache, const float* next, int first, int count, const float* q, int64_t q_stride,
                  float scale, float* scratch, bf16* out, int64_t out_stride) const {
    if (c_.d % kTileDepth) {
      VectorAttention<true, bf16>(c_).attend_all(cache, next, first, count, q, q_stride, scale, scratch, out,
                                                 out_stride);
      return;
    }
    for (int i = 0, n; i < count; i += n) {
      n = count - i < kRows ? count - i : kRows;
      attend(cache, i + n < count ? cache : next, first + i, n, q + i * q_stride, q_stride, scale, scratch,
             out + i * out_stride, out_stride);
    }
  }

 private:
  void attend(const float* cache, const float* next, int first, int count, const float* q, int64_t q_stride,
              float scale, float* scratch, bf16* out, int64_t out_stride) const {
    const int d = c_.d;
    const int64_t tokens = round_up(first + count, kTileDepth);
    float *scores = scratch, *sums = scores + kRows * tokens;   // [16][tokens], [16][d]
    bf16* weights = reinterpret_cast<bf16*>(sums + kRows * d);  // [16][tokens]
    bf16* queries = weights + kRows * tokens;                   // [16][d]
    for (int i = 0; i < count; ++i)
      for (int c = 0; c < d; c += kLanes) store(queries + i * d + c, load(q + i * q_stride + c));
    add_scores(cache, next - cache, tokens, queries, scores);
    float inverse[kRows];
    for (int i = 0; i < count; ++i)
      inverse[i] = softmax(scores + i * tokens, first + i + 1, tokens, scale, weights + i * tokens);
    add_values(cache + c_.keys_size(), next - cache, tokens, weights, sums);
    for (int i = 0; i < count; ++i)
      for (int c = 0; c < d; c += kLanes) store(out + i * out_stride + c, load(sums + i * d + c) * inverse[i]);
  }

  static constexpr int kBlockWords = kTileDepth / 2 * kKeyBlock;  // of a tile

  static void fetch(const float* p, int64_t stride) {
    for (int i = 0; i < kTileDepth / 2; ++i) __builtin_prefetch(p + i * stride);
  }

  // scores = q k^T for whole tiles of tokens
  void add_scores(const float* keys, int64_t ahead, int64_t tokens, const bf16* queries, float* scores) const {
    finish_stores();
    const int64_t block = c_.key_words() * kKeyBlock;
    for (int64_t t = 0; t < tokens; t += 2 * kKeyBlock) {
      const float* k = keys + t / kKeyBlock * block;
      _tile_zero(0);
      _tile_zero(1);
      for (int c = 0; c < c_.d; c += kTileDepth, k += kBlockWords) {
        _tile_loadd(4, queries + c, c_.d * 2);
        _tile_loadd(6, k, 64);
        _tile_loadd(7, k + block, 64);
        fetch(k + ahead, kKeyBlock);
        fetch(k + ahead + block, kKeyBlock);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, scores + t, tokens * 4);
      _tile_stored(1, scores + t + kKeyBlock, tokens * 4);
    }
  }

  // weights = exp(scale (scores - max)) of the first n tokens, 0 for the rest; returns 1 / their sum
  static float softmax(float* scores, int n, int64_t tokens, float scale, bf16* weights) {
    vint lane = {};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const vfloat none = broadcast(-std::numeric_limits<float>::infinity());
    vfloat highest = none;
    for (int t = 0; t < n; t += kLanes) {
      const vfloat s = lane < n - t ? load(scores + t) * scale : none;
      store(scores + t, s);
      highest = max(highest, s);
    }
    const float top = reduce_max(highest);
    vfloat total = {};
    int t = 0;
    for (; t < n; t += kLanes) {
      const vfloat e = exp(load(scores + t) - top);
      store(weights + t, e);
      total += e;
    }
    for (; t < tokens; t += kLanes) store(weights + t, vfloat{});
    return 1.f / reduce_add(total);
  }

  // sums = weights v
  void add_values(const float* values, int64_t ahead, int64_t tokens, const bf16* weights, float* sums) const {
    finish_stores();
    const int64_t stride = c_.d_padded, step = kTileDepth / 2 * stride;
    const int bytes = static_cast<int>(stride * 4), d = c_.d;
    for (int c = 0; c < d; c += 2 * kColumnGroup) {
      const float* v = values + c;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t t = 0; t < tokens; t += kTileDepth, v += step) {
        _tile_loadd(4, weights + t, tokens * 2);
        _tile_loadd(6, v, bytes);
        _tile_loadd(7, v + kColumnGroup, bytes);
        fetch(v + ahead, stride);
        fetch(v + ahead + kColumnGroup, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums + c, d * 4);
      _tile_stored(1, sums + c + kColumnGroup, d * 4);
    }
  }

  const CacheShape& c_;
};

}  // namespace biflow::cpu::BIFLOW_ISA

#endif
