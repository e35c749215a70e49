// Attention of one query over the cached keys and values of one sequence and head.
#pragma once

#include "block.h"
#include "cpu/convert.h"

namespace biflow::cpu::BIFLOW_ISA {

template <bool kPairs>
inline void append(const CacheShape& c, float* cache, int t, const float* key, const float* value) {
  float* k = cache + static_cast<int64_t>(t / kKeyBlock) * c.key_words() * kKeyBlock + t % kKeyBlock;
  float* v = cache + c.keys_size();
  const auto part = [](const float* p, int n) { return n >= kLanes ? load(p) : load_partial(p, n > 0 ? n : 0); };
  if constexpr (kPairs) {
    for (int i = 0; i < c.d; i += 2 * kLanes) {
      vfloat even, odd;
      split_pairs(part(key + i, c.d - i), part(key + i + kLanes, c.d - i - kLanes), even, odd);
      const vuint words = rounded_bf16(even) >> 16 | (rounded_bf16(odd) & 0xffff0000u);
      alignas(kVectorBytes) uint32_t word[kLanes];
      std::memcpy(word, &words, sizeof words);
      const int n = c.d - i < 2 * kLanes ? (c.d - i) / 2 : kLanes;
      for (int j = 0; j < n; ++j) std::memcpy(k + (i / 2 + j) * kKeyBlock, word + j, sizeof(uint32_t));
    }
    v += static_cast<int64_t>(t / 2) * c.d_padded;
    vfloat bad = {};                         // NaN where a value is not finite
    for (int i = 0; i < c.d; i += kLanes) {  // the second token of a pair comes later
      const vfloat x = part(value + i, c.d - i), off = x - x;
      bad += off;
      const vuint bits = off == off ? rounded_bf16(x) : vuint{};
      const vuint words = t % 2 ? (load_words(v + i) & 0xffffu) | (bits & 0xffff0000u) : bits >> 16;
      store(v + i, reinterpret_cast<vfloat>(words));
    }
    // Values are read with weight 0 by queries before t: they stay finite, and the key is NaN, for those from t on.
    if (const float sum = reduce_add(bad); sum != sum) {
      constexpr uint32_t kNan = 0x7fc07fc0u;
      std::memcpy(k, &kNan, sizeof kNan);
    }
  } else {
    for (int i = 0; i < c.d; ++i) k[i * kKeyBlock] = key[i];
    std::memcpy(v + static_cast<int64_t>(t) * c.d_padded, value, sizeof(float) * c.d);
  }
}

// sum[v] += q[i] key[i] over the channels, for the kKeyBlock tokens of one block
template <bool kPairs, int kChains, int kVectors>
BIFLOW_INLINE void add_scores(vfloat (&sum)[kChains][kVectors], const float* k, const float* ahead, const float* q,
                              int words) {
  int i = 0;
  for (; i + kChains <= words; i += kChains)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      __builtin_prefetch(ahead + (i + j) * kKeyBlock);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const float* at = k + (i + j) * kKeyBlock + v * kLanes;
        if constexpr (kPairs) {
          const vuint w = load_words(at);
          sum[j][v] += broadcast(q[2 * (i + j)]) * low_half(w);
          sum[j][v] += broadcast(q[2 * (i + j) + 1]) * high_half(w);
        } else {
          sum[j][v] += broadcast(q[i + j]) * load(at);
        }
      }
    }
  for (; i < words; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const float* at = k + i * kKeyBlock + v * kLanes;
      if constexpr (kPairs) {
        const vuint w = load_words(at);
        sum[0][v] += broadcast(q[2 * i]) * low_half(w);
        sum[0][v] += broadcast(q[2 * i + 1]) * high_half(w);
      } else {
        sum[0][v] += broadcast(q[i]) * load(at);
      }
    }
}

// out[d] = sum_t softmax_t(scale q . k_t) v_t over the tokens t < n; scores: scratch for n floats, rounded up to
// kKeyBlock; out has room for d rounded up to whole vectors. Fetches the same places of `next`, the cache that is read
// after this one: caches of many sequences are too scattered for the hardware to guess.
template <bool kPairs>
inline void attend(const CacheShape& c, const float* cache, const float* next, int n, const float* q, float scale,
                   float* scores, float* out) {
  const float* values = cache + c.keys_size();
  const int64_t ahead = next - cache;
  constexpr int kVectors = kKeyBlock / kLanes;
  constexpr int kChains = kVectors == 4 ? 2 : 4;  // sums in flight per vector of tokens
  const int words = c.key_words();
  vint lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  vfloat highest = broadcast(-std::numeric_limits<float>::infinity());
  for (int t = 0; t < n; t += kKeyBlock) {
    const float* k = cache + static_cast<int64_t>(t) * words;
    vfloat sum[kChains][kVectors] = {};
    add_scores<kPairs>(sum, k, k + ahead, q, words);
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

  constexpr int kPer = kPairs ? 2 : 1;        // tokens a word
  constexpr int kWide = 4, kLineFloats = 16;  // vectors of channels at a time; floats in a cache line
  const int rows = (n + kPer - 1) / kPer;
  const auto add_value = [&](vfloat& sum, const float* at, int r) {
    if constexpr (kPairs) {
      const vuint w = load_words(at);
      sum += broadcast(scores[2 * r]) * low_half(w);
      sum += broadcast(scores[2 * r + 1]) * high_half(w);
    } else {
      sum += broadcast(scores[r]) * load(at);
    }
  };
  int i = 0;
  for (; i + kWide * kLanes <= c.d_padded; i += kWide * kLanes) {
    vfloat sum[kWide] = {};
    for (int r = 0; r < rows; ++r) {
      const float* row = values + static_cast<int64_t>(r) * c.d_padded + i;
#pragma GCC unroll 4
      for (int j = 0; j < kWide * kLanes; j += kLineFloats) __builtin_prefetch(row + ahead + j);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) add_value(sum[j], row + j * kLanes, r);
    }
    for (int j = 0; j < kWide; ++j) store(out + i + j * kLanes, sum[j] * inverse);
  }
  for (; i < c.d; i += kLanes) {
    vfloat sum = {};
    for (int r = 0; r < rows; ++r) add_value(sum, values + static_cast<int64_t>(r) * c.d_padded + i, r);
    store(out + i, sum * inverse);
  }
}

// Attention of the queries of one sequence and head, one after the other.
template <bool kPairs, class Value>
class VectorAttention {
 public:
  static constexpr bool kWholeTiles = false;  // reads the cache of tokens that there are

  static int64_t scratch(const CacheShape& c) { return c.padded_tokens(); }  // floats

  explicit VectorAttention(const CacheShape& c) : c_(c) {}

  // Query i < count has its d channels at q + i * q_stride and attends to the tokens before first + i + 1; its result
  // goes to out + i * out_stride. Fetches the same places of `next`, the cache that is read after this one.
  void attend_all(const float* cache, const float* next, int first, int count, const float* q, int64_t q_stride,
                  float scale, float* scratch, Value* out, int64_t out_stride) const {
    alignas(64) float result[kLargestHead];
    for (int i = 0; i < count; ++i, out += out_stride) {
      attend<kPairs>(c_, cache, i + 1 < count ? cache : next, first + i + 1, q + i * q_stride, scale, scratch, result);
      int c = 0;
      for (; c + kLanes <= c_.d; c += kLanes) store(out + c, load(result + c));
      if (c < c_.d) store_partial(out + c, load(result + c), c_.d - c);
    }
  }

 private:
  static constexpr int kLargestHead = 256;
  const CacheShape& c_;
};

// Rotates the pairs (2i, 2i + 1) of x[d] by the angles whose cosines and sines are given, [d / 2] each.
inline void rotate(float* x, const float* cosine, const float* sine, int d) {
  for (int i = 0; i < d / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cosine[i] - odd * sine[i];
    x[2 * i + 1] = even * sine[i] + odd * cosine[i];
  }
}

}  // namespace biflow::cpu::BIFLOW_ISA
