// The attention of one step: one query for each sequence and head over all tokens so far. An item is one split of the
// tokens of a sequence and head; plan.warps warps share its tokens, plan.splits items those of a query.
//
// A key's channels lie side by side in memory; `lanes` neighbouring lanes take eight each, so that a warp reads 32 /
// lanes keys at a time. The token of this step is not in the cache yet: the item whose split it ends normalises and
// rotates its key, and appends it and its value.
#pragma once

#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {

template <class Act>
class StepAttention {
 public:
  // exchange: of two turns, each warp's sums, their weight and largest logit.
  BIFLOW_DEVICE StepAttention(const DecodeState& s, float* exchange) : s_(s), exchange_(exchange) {
    while (8 * lanes_ < s.head_stride) lanes_ *= 2;
    group_ = threadIdx.x % 32 / lanes_, channel_ = threadIdx.x % 32 % lanes_ * 8;
    inside_ = channel_ < s.head_stride;
  }

  BIFLOW_DEVICE void run(int step, int layer) {
    const int warps = s_.plan.warps, at_once = kDecodeWarps / warps, warp = threadIdx.x / 32;
    const int64_t queries = static_cast<int64_t>(s_.rows) * s_.heads, items = queries * s_.plan.splits;
    int turn = 0;
    const int64_t blocks = gridDim.x;  // neighbouring items go to different ones
    for (int64_t first = blockIdx.x; first < items; first += blocks * at_once, turn ^= 1) {
      const int64_t item = first + blocks * (warp / warps);
      float* const own = exchange_ + (turn * kDecodeWarps + warp) * (s_.head_stride + 2);
      const bool valid = item < items;
      const int64_t query = valid ? item % queries : 0;
      const int split = static_cast<int>(valid ? item / queries : 0), row = static_cast<int>(query / s_.heads),
                head = static_cast<int>(query % s_.heads);
      if (valid) attend(step, layer, row, head, split, warp % warps);
      if (warps > 1) {
        if (valid && group_ == 0) put(own);
        __syncthreads();  // the next write to this turn's places comes after the next turn's barrier
        if (valid && warp % warps == 0 && group_ == 0) {
          clear();
          for (int w = 0; w < warps; ++w) take(own + w * (s_.head_stride + 2));
        }
      }
      if (valid && warp % warps == 0 && group_ == 0 && inside_) store(row, head, split);
    }
  }

 private:
  using Eight = arch::Vector<Act, 8>;
  static constexpr int kAhead = sizeof(Act) == 2 ? 4 : 2;  // rounds of keys whose loads are under way at once

  // Eight cached channels as they lie in memory, written by this launch.
  struct Words {
    uint4 word[sizeof(Act) / 2];

    BIFLOW_DEVICE static Words load(const Act* from) {
      Words w;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Act)) / 2; ++i)
        w.word[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
      return w;
    }
    BIFLOW_DEVICE void to(float (&x)[8]) const {
      Act v[8];
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Act)) / 2; ++i)
        memcpy(reinterpret_cast<unsigned char*>(v) + 16 * i, &word[i], 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = arch::to_float(v[i]);
    }
  };

  BIFLOW_DEVICE void clear() {
    top_ = -INFINITY, sum_ = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) o_[i] = 0;
  }

  // Keys and values of a few rounds of tokens, as they lie in memory.
  struct Round {
    Words k[kAhead], v[kAhead];
  };

  // Sums over the tokens of this warp's share, the same in all groups of lanes at the end. What is read of memory is on
  // its way before the first of it is used.
  BIFLOW_DEVICE void attend(int step, int layer, int row, int head, int split, int member) {
    const int splits = s_.plan.splits, warps = s_.plan.warps, tokens = step + 1, keys = 32 / lanes_;
    const int share = (tokens + splits - 1) / splits, begin = split * share;
    const int end = begin + share < tokens ? begin + share : tokens;
    const bool unconditional = row >= s_.batch;
    const int64_t half = static_cast<int64_t>(s_.prefix + s_.tokens) * s_.head_stride;
    Act* const cached =
        static_cast<Act*>(s_.cache) + ((static_cast<int64_t>(layer) * s_.rows + row) * s_.heads + head) * 2 * half;
    const int cached_end = end < step ? end : step, stride = kAhead * warps * keys;
    const auto load = [&](Round& to, int first) {
      to = {};  // a register that is set in some turns only is kept through all phases
      if (first >= cached_end) return;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int token = first + i * warps * keys + group_;
        const bool counts = inside_ && token < cached_end;
        const int64_t at = static_cast<int64_t>(counts ? token : begin) * s_.head_stride + (inside_ ? channel_ : 0);
        to.k[i] = Words::load(cached + at);
        to.v[i] = Words::load(cached + half + at);  // of weight 0 where it does not count; `begin` does
      }
    };
    const auto use = [&](const float (&q)[8], const Round& round, int first) {
      if (first >= cached_end) return;
      float logit[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        float key[8];
        round.k[i].to(key);
        logit[i] = product(q, key);
      }
      over_group(logit);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * warps * keys + group_ >= cached_end) logit[i] = -INFINITY;
      weigh<kAhead>(logit, [&](int i, float (&value)[8]) { round.v[i].to(value); });
    };

    const bool own = end == tokens && begin < tokens && member == 0;  // this step's token is not in the cache yet
    float q[8], k[8] = {}, v[8] = {};
    load_head(q, row, 0, head);
    if (own) load_head(k, row, 1, head), load_head(v, row, 2, head);
    const Rotation rotation = rotation_of(step);
    Round even, odd;
    int first = begin + member * keys;
    load(even, first);
    prepare(q, layer, s_.packed.layer.q_norm, rotation);
    const float scale = 1.4426950408889634f /
                        (sqrtf(static_cast<float>(s_.head_dim)) * (unconditional ? s_.condition.attn_temp : 1.0f));
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] *= scale;
    clear();
    for (; first < cached_end; first += 2 * stride) {
      load(odd, first + stride);
      use(q, even, first);
      load(even, first + 2 * stride);
      use(q, odd, first + stride);
    }
    if (own) {
      prepare(k, layer, s_.packed.layer.k_norm, rotation);
      Eight key, value;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        key.v[i] = arch::from_float<Act>(k[i]), value.v[i] = arch::from_float<Act>(v[i]);
        k[i] = arch::to_float(key.v[i]), v[i] = arch::to_float(value.v[i]);
      }
      if (group_ == 0 && inside_) {
        const int64_t at = static_cast<int64_t>(step) * s_.head_stride + channel_;
        key.store(cached + at);
        value.store(cached + half + at);
      }
      float logit[1] = {product(q, k)};
      over_group(logit);
      if (group_ != 0) logit[0] = -INFINITY;
      weigh<1>(logit, [&](int, float (&to)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = v[i];
      });
    }
#pragma unroll 1
    for (int lane = lanes_; lane < 32; lane *= 2) {
      const float top = __shfl_xor_sync(0xffffffffu, top_, lane), sum = __shfl_xor_sync(0xffffffffu, sum_, lane);
      float o[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] = __shfl_xor_sync(0xffffffffu, o_[i], lane);
      join(top, sum, o);
    }
  }

  // Eight channels of a head of this step's query (which = 0), key (1) or value (2); zeros past the head.
  BIFLOW_DEVICE void load_head(float (&x)[8], int row, int which, int head) const {
    const float* const from =
        s_.qkv + static_cast<int64_t>(row) * s_.qkv_stride + which * s_.width + head * s_.head_dim + channel_;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float2 pair = {0, 0};
      if (channel_ + i < s_.head_dim) pair = __ldcg(reinterpret_cast<const float2*>(from + i));
      x[i] = pair.x, x[i + 1] = pair.y;
    }
  }

  // The angles of this lane's channel pairs in a step.
  struct Rotation {
    bool turns;
    float cosine[4], sine[4];
  };
  BIFLOW_DEVICE Rotation rotation_of(int step) const {
    Rotation r = {s_.rope && !s_.in_prefix(step), {}, {}};
    if (!r.turns) return r;
    const int64_t at = static_cast<int64_t>(s_.data_index(s_.evaluated(step))) * (s_.head_dim / 2) + channel_ / 2;
    const float *const cosine = s_.weights + s_.packed.rope_cos + at, *const sine =
                                                                          s_.weights + s_.packed.rope_sin + at;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (channel_ + 2 * i < s_.head_dim) r.cosine[i] = __ldg(cosine + i), r.sine[i] = __ldg(sine + i);
    return r;
  }

  // Norm and rotation of a query or key.
  BIFLOW_DEVICE void prepare(float (&x)[8], int layer, int64_t weight_at, const Rotation& rotation) const {
    if (s_.qk_norm) {
      float squares[1] = {0};
#pragma unroll
      for (int i = 0; i < 8; ++i) squares[0] += x[i] * x[i];
      over_group(squares);
      const float factor = rsqrtf(squares[0] / s_.head_dim + 1e-6f);
      const float* const weight = layer_vector(s_, layer, weight_at) + channel_;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (channel_ + i < s_.head_dim) x[i] *= factor * __ldg(weight + i);
    }
    if (!rotation.turns) return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (channel_ + 2 * i < s_.head_dim) {
        const float even = x[2 * i], odd = x[2 * i + 1], c = rotation.cosine[i], s = rotation.sine[i];
        x[2 * i] = even * c - odd * s;
        x[2 * i + 1] = even * s + odd * c;
      }
  }

  // This lane's channels of a logit.
  BIFLOW_DEVICE float product(const float (&q)[8], const float (&k)[8]) const {
    float logit = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) logit += q[i] * k[i];
    return inside_ ? logit : 0;
  }

  // n sums over a group of lanes.
  template <int n>
  BIFLOW_DEVICE void over_group(float (&v)[n]) const {
#pragma unroll 1
    for (int lane = 1; lane < lanes_; lane *= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], lane);
  }

  // Takes in n values, value(i, v), by their logits; -infinity: not that one.
  template <int n, class Value>
  BIFLOW_DEVICE void weigh(const float (&logit)[n], Value&& value) {
    float top = top_;
#pragma unroll
    for (int i = 0; i < n; ++i) top = fmaxf(top, logit[i]);
    const float base = top == -INFINITY ? 0 : top, old = arch::exp2_fast(top_ - base);
    top_ = top;
    sum_ *= old;
#pragma unroll
    for (int i = 0; i < 8; ++i) o_[i] *= old;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float weight = arch::exp2_fast(logit[i] - base);
      sum_ += weight;
      float v[8];
      value(i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) o_[j] += weight * v[j];
    }
  }

  BIFLOW_DEVICE void join(float other_top, float other_sum, const float (&other)[8]) {
    const float top = fmaxf(top_, other_top), base = top == -INFINITY ? 0 : top;
    const float mine = arch::exp2_fast(top_ - base), theirs = arch::exp2_fast(other_top - base);
    top_ = top;
    sum_ = sum_ * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < 8; ++i) o_[i] = o_[i] * mine + other[i] * theirs;
  }

  BIFLOW_DEVICE void put(float* own) const {
    if (inside_) {
#pragma unroll
      for (int i = 0; i < 8; ++i) own[channel_ + i] = o_[i];
    }
    if (channel_ == 0) own[s_.head_stride] = top_, own[s_.head_stride + 1] = sum_;
  }
  BIFLOW_DEVICE void take(const float* other) {
    float o[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = inside_ ? other[channel_ + i] : 0;
    join(other[s_.head_stride], other[s_.head_stride + 1], o);
  }

  // The result of an item. A split without tokens has weight 0.
  BIFLOW_DEVICE void store(int row, int head, int split) const {
    const float factor = sum_ > 0 ? 1 / sum_ : sum_ == 0 ? 0 : sum_;  // NaN stays
    const int64_t at = (static_cast<int64_t>(split) * s_.rows + row) * s_.x_stride + head * s_.head_dim + channel_;
    const bool whole = s_.plan.splits == 1;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if (channel_ + i >= s_.head_dim) continue;
      if (whole) {
        arch::Vector<Act, 2> pair;
        pair.v[0] = arch::from_float<Act>(o_[i] * factor), pair.v[1] = arch::from_float<Act>(o_[i + 1] * factor);
        pair.store(static_cast<Act*>(s_.o) + at + i);
      } else {
        arch::Vector<float, 2>{{o_[i] * factor, o_[i + 1] * factor}}.store(s_.partial + at + i);
      }
    }
    if (!whole && channel_ == 0)
      s_.lse[(static_cast<int64_t>(split) * s_.rows + row) * s_.heads + head] =
          sum_ == 0 ? -INFINITY : top_ + log2f(sum_);
  }

  const DecodeState& s_;
  float* const exchange_;  // [2][kDecodeWarps][head_stride + 2]
  int lanes_ = 1, group_ = 0, channel_ = 0;
  bool inside_ = false;     // whether this lane has channels
  float top_, sum_, o_[8];  // of the lane's group, of powers of 2
};

}  // namespace biflow::cuda
