// Attention of one query over the cached keys and values of one sequence and head.
#pragma once

#include "cpu/simd_math.h"
#include "decode_block.h"

namespace biflow::cpu::BIFLOW_ISA {

constexpr int kKeyBlock = 16;  // tokens

// The cache of one sequence and head: keys in blocks of kKeyBlock tokens, each [d][kKeyBlock], so that a vector holds
// one channel of neighbouring tokens and a block is read front to back; then values [token][d padded].
struct CacheShape {
  int d = 0, d_padded = 0, key_blocks = 0, tokens = 0;

  CacheShape(int head_dim, int max_tokens)
      : d(head_dim),
        d_padded(static_cast<int>(padded_columns(head_dim))),
        key_blocks((max_tokens + kKeyBlock - 1) / kKeyBlock),
        tokens(max_tokens) {}

  int64_t keys_size() const { return static_cast<int64_t>(key_blocks) * d * kKeyBlock; }
  int64_t size() const { return keys_size() + static_cast<int64_t>(tokens) * d_padded; }
};

inline void append(const CacheShape& c, float* cache, int t, const float* key, const float* value) {
  float* k = cache + static_cast<int64_t>(t / kKeyBlock) * c.d * kKeyBlock + t % kKeyBlock;
  for (int i = 0; i < c.d; ++i) k[i * kKeyBlock] = key[i];
  std::memcpy(cache + c.keys_size() + static_cast<int64_t>(t) * c.d_padded, value, sizeof(float) * c.d);
}

// out[d] = sum_t softmax_t(scale q . k_t) v_t over the tokens t < n; scores: scratch for n floats, rounded up to
// kKeyBlock. Fetches 16 tokens ahead, at the end the first keys of `next`, the cache that is read after this one:
// caches of many sequences are too scattered for the hardware to guess.
inline void attend(const CacheShape& c, const float* cache, const float* next, int n, const float* q, float scale,
                   float* scores, float* out) {
  const float* values = cache + c.keys_size();
  constexpr int kVectors = kKeyBlock / kLanes;
  constexpr int kChains = kVectors == 4 ? 2 : 4;  // sums in flight per vector of tokens
  vint lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vfloat highest = broadcast(-std::numeric_limits<float>::infinity());
  for (int t = 0; t < n; t += kKeyBlock) {
    const float* k = cache + static_cast<int64_t>(t) * c.d;
    const float* ahead = t + kKeyBlock < n ? k + c.d * kKeyBlock : values;
    vfloat sum[kChains][kVectors] = {};
    int i = 0;
    for (; i + kChains <= c.d; i += kChains)
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        __builtin_prefetch(ahead + (i + j) * kKeyBlock);
        const vfloat qi = broadcast(q[i + j]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[j][v] += qi * load(k + (i + j) * kKeyBlock + v * kLanes);
      }
    for (; i < c.d; ++i)
      for (int v = 0; v < kVectors; ++v) sum[0][v] += broadcast(q[i]) * load(k + i * kKeyBlock + v * kLanes);
    for (int v = 0; v < kVectors; ++v) {
      vfloat s = sum[0][v] + sum[1][v];
      if constexpr (kChains == 4) s += sum[2][v] + sum[3][v];
      // tokens from n on are not there yet: their memory may hold anything
      s = lane < n - t - v * kLanes ? s * scale : broadcast(-std::numeric_limits<float>::infinity());
      store(scores + t + v * kLanes, s);
      highest = max(highest, s);
    }
  }
  const float top = reduce_max(highest);
  vfloat total = {};
  for (int t = 0; t < n; t += kLanes) {
    const vfloat e = exp(load(scores + t) - top);  // 0 for the tokens from n on
    store(scores + t, e);
    total += e;
  }
  const float inverse = 1.f / reduce_add(total);

  constexpr int kWide = 4, kLineFloats = 16;  // vectors of channels at a time; floats in a cache line
  int i = 0;
  for (; i + kWide * kLanes <= c.d_padded; i += kWide * kLanes) {
    vfloat sum[kWide] = {};
    for (int t = 0; t < n; ++t) {
      const vfloat w = broadcast(scores[t]);
      const float* ahead = t + kKeyBlock < n ? values + static_cast<int64_t>(t + kKeyBlock) * c.d_padded
                                             : next + static_cast<int64_t>(t + kKeyBlock - n) * c.d_padded;
#pragma GCC unroll 4
      for (int j = 0; j < kWide * kLanes; j += kLineFloats) __builtin_prefetch(ahead + i + j);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j)
        sum[j] += w * load(values + static_cast<int64_t>(t) * c.d_padded + i + j * kLanes);
    }
    for (int j = 0; j < kWide; ++j) {
      const int rest = c.d - i - j * kLanes;
      if (rest >= kLanes)
        store(out + i + j * kLanes, sum[j] * inverse);
      else if (rest > 0)
        store_partial(out + i + j * kLanes, sum[j] * inverse, rest);
    }
  }
  for (; i < c.d; i += kLanes) {
    vfloat sum = {};
    for (int t = 0; t < n; ++t) sum += broadcast(scores[t]) * load(values + static_cast<int64_t>(t) * c.d_padded + i);
    store_partial(out + i, sum * inverse, c.d - i < kLanes ? c.d - i : kLanes);
  }
}

// Rotates the pairs (2i, 2i + 1) of x[d] by the angles whose cosines and sines are given, [d / 2] each.
inline void rotate(float* x, const float* cosine, const float* sine, int d) {
  for (int i = 0; i < d / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cosine[i] - odd * sine[i];
    x[2 * i + 1] = even * sine[i] + odd * cosine[i];
  }
}

}  // namespace biflow::cpu::BIFLOW_ISA
