// The transformer of one flow block over a static KV cache, run by a crew on one group of samples: tokens in, raw
// parameters out.
//
// A sequence is one sample under one condition: the conditional ones come first, then, with guidance, the unconditional
// ones. A row is one token of one sequence: row q * count + i is token i of sequence q.
#pragma once

#include <algorithm>

#include "affine.h"
#include "cpu/activations.h"
#include "cpu/attention_step.h"
#include "cpu/crew.h"
#include "cpu/linear.h"
#include "cpu/linear_bf16.h"

namespace biflow::cpu::BIFLOW_ISA {

// Pieces of one array, each on a 64-byte boundary; counts while there is no array.
class Scratch {
 public:
  explicit Scratch(float* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t n) {
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

constexpr int kFewRows = 4;       // so few rows every member normalises for itself
constexpr int kPrefillRows = 48;  // prefix tokens go through the layers in groups of about so many rows

template <class P>
class Transformer {
 public:
  using Value = typename P::Value;

  // Up to `samples` samples and `count` tokens at once. Keeps references. caches: null, or [sequence][caches_size()] of
  // all samples, the conditional ones first.
  Transformer(const BlockShape& shape, const float* packed, const BlockCondition& condition, bool flip, int64_t batch,
              int64_t samples, int count, float* caches, Scratch& scratch, Member& member)
      : s_(shape),
        condition_(condition),
        data_(packed),
        packed_(packed_block(shape)),
        cache_(shape, condition.prefix_tokens),
        flip_(flip),
        batch_(batch),
        given_caches_(caches),
        member_(member),
        width_(round_up(shape.width, kTileDepth)),
        qkv_width_(packed_.layer.qkv.columns),
        hidden_width_(round_up(shape.mlp_hidden, kTileDepth)),
        raw_width_(packed_.proj_out.columns) {
    const int64_t sequences = samples * (condition.guided ? 2 : 1);
    max_rows_ = std::max(sequences * count, std::min<int64_t>(kPrefillRows, sequences * condition.prefix_tokens));
    const int64_t rows = round_up(max_rows_, 32);  // a tile product reads whole tiles of rows
    h_ = scratch.take<float>(rows * width_);
    qkv_ = scratch.take<float>(rows * qkv_width_);
    raw_ = scratch.take<float>(rows * raw_width_);
    values_ = scratch.take<Value>(rows * (2 * width_ + hidden_width_));
    few_ = scratch.take<Value>(member.count() * kFewRows * width_);
    scores_width_ = cache_.padded_tokens();
    scores_ = scratch.take<float>(member.count() * scores_width_);
    own_caches_ = caches ? nullptr : scratch.take<float>(sequences * caches_size());
    y_ = values_, attended_ = y_ + rows * width_, hidden_ = attended_ + rows * width_;
    values_size_ = rows * (2 * width_ + hidden_width_);
  }

  int64_t caches_size() const { return static_cast<int64_t>(s_.layers) * s_.heads() * cache_.size(); }
  int data_index(int n) const { return flip_ ? s_.tokens - 1 - n : n; }

  // Before the first group: what padding is read must be zero.
  void clear() {
    member_.phase([&](int part) {
      if (part == 0) {
        std::memset(static_cast<void*>(values_), 0, sizeof(Value) * values_size_);
        std::memset(static_cast<void*>(few_), 0, sizeof(Value) * member_.count() * kFewRows * width_);
      }
    });
  }

  // The group to work on from now on.
  void begin(int64_t first, int64_t samples) {
    first_ = first;
    samples_ = static_cast<int>(samples);
    sequences_ = samples_ * (condition_.guided ? 2 : 1);
  }

  // Keys and values of the prefix.
  void prefill() {
    const int64_t row_size = s_.width, prefix = condition_.prefix_tokens;
    for (int t = 0, count; t < prefix; t += count) {
      count = static_cast<int>(std::min<int64_t>(prefix - t, max_rows_ / sequences_));
      member_.phase([&](int part) {
        if (part > 0) return;
        for (int q = 0; q < sequences_; ++q) {
          const float* from = unconditional(q) ? condition_.null_prefix : condition_.prefix;
          for (int i = 0; i < count; ++i) {
            float* h = h_ + (static_cast<int64_t>(q) * count + i) * width_;
            std::memcpy(h, from + (sample(q) * prefix + t + i) * row_size, sizeof(float) * row_size);
            std::fill(h + row_size, h + width_, 0.f);
          }
        }
      });
      layers(t, count, false);
    }
  }

  // The share of member `part` of the `n` samples' tokens (sample b, i): use(b, first i, last i).
  template <class Use>
  void share(int part, int count, Use&& use) const {
    const int64_t rows = static_cast<int64_t>(samples_) * count, members = member_.count();
    const int64_t begin = rows * part / members, end = rows * (part + 1) / members;
    for (int64_t r = begin; r < end;) {
      const int b = static_cast<int>(r / count), i = static_cast<int>(r % count);
      const int64_t last = std::min<int64_t>(count, i + end - r);
      use(b, i, static_cast<int>(last));
      r += last - i;
    }
  }

  // h = proj_in(u) + position + class for the network's tokens evaluated + [i, last) of sample b. u is the token
  // itself, or with a start token the one before it. x (B, T, D).
  void embed(const float* x, int b, int evaluated, int count, int i, int last) {
    const int64_t D = s_.channels;
    for (int n = evaluated + i; n < evaluated + last; ++n) {
      const int source = s_.start_token ? n - 1 : n;
      const float* u =
          source < 0 ? data_ + packed_.start_token : x + ((first_ + b) * s_.tokens + data_index(source)) * D;
      float* h = h_ + (static_cast<int64_t>(b) * count + n - evaluated) * width_;
      std::fill(h + s_.width, h + width_, 0.f);
      Fp32::product(data_, packed_.proj_in, u, 0, 1, 0, packed_.proj_in.columns,
                    [&](int, int, int c, int columns, const float* v, int) { copy(v, h + c, columns); });
      if (s_.pos_embed) add(data_ + packed_.pos_embed + data_index(n) * padded_columns(s_.width), h, s_.width);
      if (condition_.guided) {
        float* other = h + static_cast<int64_t>(samples_) * count * width_;
        copy(h, other, static_cast<int>(width_));
        if (condition_.null_added) add(condition_.null_added + (first_ + b) * s_.width, other, s_.width);
      }
      if (condition_.added) add(condition_.added + (first_ + b) * s_.width, h, s_.width);
    }
  }

  // The next `count` tokens of every sequence, at the cache's positions from `position` on: h in, h out. The prefix is
  // not rotated, and of it the last layer needs keys and values only.
  void layers(int position, int count, bool tokens) {
    const int rows = sequences_ * count;
    session_.rows(rows);
    for (int j = 0; j < s_.layers; ++j) {
      const float* layer = data_ + packed_.first_layer + j * packed_.layer_size;
      const PackedLayer& at = packed_.layer;
      normalized(layer, at.norm1_weight, at.norm1_bias, rows, at.qkv,
                 [&](int row, int n, int c, int columns, const float* v, int stride) {
                   for (int r = 0; r < n; ++r) copy(v + r * stride, qkv_ + (row + r) * qkv_width_ + c, columns);
                 });
      const bool keys_only = !tokens && j == s_.layers - 1;
      member_.phase([&](int part) {
        const int units = sequences_ * s_.heads(), members = member_.count();
        for (int u = units * part / members; u < units * (part + 1) / members; ++u)
          attention(layer, j, u / s_.heads(), u % s_.heads(), position, count, tokens, keys_only);
      });
      if (keys_only) return;
      const auto add_to_h = [&](int row, int n, int c, int columns, const float* v, int stride) {
        columns = std::min<int>(columns, static_cast<int>(width_) - c);
        for (int r = 0; r < n; ++r) add(v + r * stride, h_ + (row + r) * width_ + c, columns);
      };
      multiply(layer, at.proj, attended_, width_, rows, add_to_h);
      normalized(layer, at.norm2_weight, at.norm2_bias, rows, at.fc1,
                 [&](int row, int n, int c, int columns, const float* v, int stride) {
                   for (int r = 0; r < n; ++r) gate(v + r * stride, row + r, c, columns);
                 });
      multiply(layer, at.fc2, hidden_, hidden_width_, rows, add_to_h);
    }
  }

  // The raw parameters that the network wrote for block token n of sample b, from token i of `count`: guided, in its
  // layout.
  const float* raw(const AffineOptions& affine, int b, int n, int count, int i) {
    const int64_t row = static_cast<int64_t>(b) * count + i, other = row + static_cast<int64_t>(samples_) * count;
    float* raw = raw_ + row * raw_width_;
    project(row);
    if (!condition_.guided) return raw;
    project(other);
    const float* null_raw = raw_ + other * raw_width_;
    const float g = condition_.anneal ? condition_.guidance * n / std::max(s_.tokens - 1, 1) : condition_.guidance;
    const int D = s_.channels, columns = s_.raw_columns();
    for (int c = 0; c < columns; ++c) {
      const bool shift = s_.shift_only || (affine.layout == Layout::interleaved   ? c % 2 == 1
                                           : affine.layout == Layout::shift_scale ? c < D
                                                                                  : c >= D);
      if (shift ? condition_.guide_b : condition_.guide_a) raw[c] += g * (raw[c] - null_raw[c]);
    }
    return raw;
  }
  int samples() const { return samples_; }
  int64_t first() const { return first_; }

 private:
  static void copy(const float* from, float* to, int n) {  // n: whole groups of columns
    for (int i = 0; i < n; i += kLanes) store(to + i, load(from + i));
  }
  static void add(const float* from, float* to, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(from + i));
    for (; i < n; ++i) to[i] += from[i];
  }

  void project(int64_t row) {  // raw = proj_out(h)
    Fp32::product(
        data_, packed_.proj_out, h_ + row * width_, width_, 1, 0, packed_.proj_out.columns,
        [&](int, int, int c, int columns, const float* v, int) { copy(v, raw_ + row * raw_width_ + c, columns); });
  }

  bool unconditional(int sequence) const { return sequence >= samples_; }
  int64_t sample(int sequence) const { return first_ + (unconditional(sequence) ? sequence - samples_ : sequence); }

  float* cache(int layer, int sequence, int head) const {
    const int64_t q = !given_caches_            ? sequence
                      : unconditional(sequence) ? batch_ + sample(sequence)
                                                : sample(sequence);
    float* caches = given_caches_ ? given_caches_ : own_caches_;
    return caches + q * caches_size() + (static_cast<int64_t>(layer) * s_.heads() + head) * cache_.size();
  }

  void normalize(const float* layer, int64_t weight, int64_t bias, int row, Value* y) const {
    const float* x = h_ + row * width_;
    if (s_.norm == Norm::layernorm)
      layer_norm(x, layer + weight, layer + bias, y, s_.width);
    else
      rms_norm(x, layer + weight, y, s_.width);
  }

  // The columns of a product that are part `part`: whole panels if they can be shared evenly.
  template <class Sink>
  void multiply_part(int part, const float* layer, const PackedLinear& at, const Value* x, int64_t stride, int rows,
                     Sink&& sink) const {
    const int members = member_.count();
    const int unit = at.columns % (kPanelColumns * members) == 0 ? kPanelColumns : kTileColumns;
    const int units = (at.columns + unit - 1) / unit;
    const int first = units * part / members * unit, last = std::min(units * (part + 1) / members * unit, at.columns);
    if (first < last) P::product(layer, at, x, stride, rows, first, last, sink);
  }

  template <class Sink>
  void multiply(const float* layer, const PackedLinear& at, const Value* x, int64_t stride, int rows, Sink&& sink) {
    member_.phase([&](int part) { multiply_part(part, layer, at, x, stride, rows, sink); });
  }

  // norm(h) W^T + bias
  template <class Sink>
  void normalized(const float* layer, int64_t weight, int64_t bias, int rows, const PackedLinear& at, Sink&& sink) {
    const bool few = rows <= kFewRows;
    if (!few)
      member_.phase([&](int part) {
        const int members = member_.count();
        for (int r = rows * part / members; r < rows * (part + 1) / members; ++r)
          normalize(layer, weight, bias, r, y_ + r * width_);
      });
    member_.phase([&](int part) {
      Value* y = few ? few_ + member_.me() * kFewRows * width_ : y_;
      for (int r = 0; few && r < rows; ++r) normalize(layer, weight, bias, r, y + r * width_);
      multiply_part(part, layer, at, y, width_, rows, sink);
    });
  }

  void gate(const float* v, int row, int c, int columns) const {
    Value* hidden = hidden_ + row * hidden_width_;
    if (s_.gate == Gate::gelu) {
      columns = std::min<int>(columns, static_cast<int>(hidden_width_) - c);
      for (int i = 0; i < columns; i += kLanes) store(hidden + c + i, gelu(load(v + i)));
    } else {
      for (int i = 0; i < columns; i += 2 * kColumnGroup)
        for (int k = 0; k < kColumnGroup; k += kLanes) {
          const vfloat x = load(v + i + k);
          store(hidden + (c + i) / 2 + k, x * sigmoid(x) * load(v + i + kColumnGroup + k));
        }
    }
  }

  void attention(const float* layer, int j, int sequence, int head, int position, int count, bool tokens,
                 bool keys_only) {
    const int d = s_.head_dim;
    const float temperature = unconditional(sequence) ? condition_.attn_temp : 1.f;
    const float scale = 1.f / (std::sqrt(static_cast<float>(d)) * temperature);
    float* memory = cache(j, sequence, head);
    float* rows = qkv_ + static_cast<int64_t>(sequence) * count * qkv_width_ + head * d;
    for (int i = 0; i < count; ++i) {
      float *q = rows + i * qkv_width_, *k = q + s_.width, *v = k + s_.width;
      if (s_.qk_norm) {
        rms_norm(q, layer + packed_.layer.q_norm, q, d);
        rms_norm(k, layer + packed_.layer.k_norm, k, d);
      }
      if (s_.rope && tokens) {
        const int64_t row = data_index(position - condition_.prefix_tokens + i);
        const float* cosine = data_ + packed_.rope_cos + row * (d / 2);
        const float* sine = data_ + packed_.rope_sin + row * (d / 2);
        rotate(q, cosine, sine, d);
        rotate(k, cosine, sine, d);
      }
      append<P::kPairs>(cache_, memory, position + i, k, v);
    }
    if (keys_only) return;
    alignas(64) float out[kLargestHead];
    float* scores = scores_ + member_.me() * scores_width_;
    for (int i = 0; i < count; ++i) {
      // heads and sequences lie one after the other; the last one's `next` is not read, only fetched
      attend<P::kPairs>(cache_, memory, memory + cache_.size(), position + i + 1, rows + i * qkv_width_, scale, scores,
                        out);
      Value* to = attended_ + (static_cast<int64_t>(sequence) * count + i) * width_ + head * d;
      int c = 0;
      for (; c + kLanes <= d; c += kLanes) store(to + c, load(out + c));
      if (c < d) store_partial(to + c, load(out + c), d - c);
    }
  }

  static constexpr int kLargestHead = 256;

  const BlockShape& s_;
  const BlockCondition& condition_;
  const float* data_;
  const PackedBlock packed_;
  const CacheShape cache_;
  const bool flip_;
  const int64_t batch_;
  float* given_caches_;
  Member& member_;
  typename P::Session session_;
  const int64_t width_, qkv_width_, hidden_width_, raw_width_;  // row strides of the buffers below
  int64_t max_rows_ = 0, scores_width_ = 0, values_size_ = 0, first_ = 0;
  int samples_ = 0, sequences_ = 0;

  // shared by the crew
  float* h_ = nullptr;    // [rows][width]  the residual stream
  float* qkv_ = nullptr;  // [rows][3 width]
  float* raw_ = nullptr;  // [rows][2D or D]
  Value *values_ = nullptr, *y_ = nullptr, *attended_ = nullptr, *hidden_ = nullptr;  // [rows][width], .., [F]
  float* own_caches_ = nullptr;  // [sequence][layer][head][cache_.size()]
  // one for each member
  Value* few_ = nullptr;     // [kFewRows][width]  normalised
  float* scores_ = nullptr;  // [tokens]
};

}  // namespace biflow::cpu::BIFLOW_ISA
