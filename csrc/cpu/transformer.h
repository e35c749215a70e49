// The transformer of one flow block over a static KV cache, run by a crew on one group of samples: tokens in, raw
// parameters out.
//
// A sequence is one sample under one condition: the conditional ones come first, then, with guidance, the unconditional
// ones. A row is one token of one sequence: row q * count + i is token i of sequence q.
#pragma once

#include <algorithm>
#include <utility>

#include "affine.h"
#include "cpu/activations.h"
#include "cpu/attention_step.h"
#include "cpu/attention_tiles.h"
#include "cpu/crew.h"
#include "cpu/linear.h"
#include "cpu/linear_bf16.h"
#include "cpu/runner.h"

namespace biflow::cpu::BIFLOW_ISA {

constexpr int kFewRows = 4;       // so few rows every member normalises for itself
constexpr int kPrefillRows = 48;  // prefix tokens go through the layers in groups of about so many rows

// One query after the other: the fastest for one.
template <class P>
using StepAttention = VectorAttention<P::kPairs, typename P::Value>;

// For many queries of a sequence.
template <class P>
struct PassAttention {
  using type = StepAttention<P>;
};
#ifdef __AMX_BF16__
template <>
struct PassAttention<Bf16> {
  using type = TileAttention;
};
#endif

template <class P, class Attention>
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
    own_h_ = scratch.take<float>(2 * kFewRows * width_);
    sums_ = scratch.take<float>(rows * width_);
    scores_width_ = Attention::scratch(cache_);
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
    if (Attention::kWholeTiles && own_caches_)  // tiles are multiplied whole, with weight 0 where there is no token yet
      member_.phase([&](int part) {
        const int64_t size = sequences_ * caches_size(), members = member_.count();
        std::fill(own_caches_ + size * part / members, own_caches_ + size * (part + 1) / members, 0.f);
      });
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

  // Rows [begin, end) of the conditional sequences, of `count` tokens each, that are member `part`'s.
  template <class Use>
  void share(int part, int count, Use&& use) const {
    const int64_t rows = static_cast<int64_t>(samples_) * count, members = member_.count();
    use(static_cast<int>(rows * part / members), static_cast<int>(rows * (part + 1) / members));
  }

  // h = proj_in(u) + position + class for the rows [begin, end) of a share, of the network's tokens from `evaluated`
  // on. u is the token itself, or with a start token the one before it. x (B, T, D).
  void embed(const float* x, int evaluated, int count, int begin, int end) {
    const int64_t D = s_.channels, sample_size = D * s_.tokens;
    const int before = s_.start_token ? 1 : 0;
    for (int row = begin, n; row < end; row += n) {  // rows whose tokens lie in steps of one size
      const int b = row / count, t = evaluated + row % count - before;
      n = count == 1 ? end - row : t < 0 ? 1 : std::min(end - row, count - row % count);
      const float* u = t < 0 ? data_ + packed_.start_token : x + (first_ + b) * sample_size + data_index(t) * D;
      const int64_t step = t < 0 ? 0 : count == 1 ? sample_size : flip_ ? -D : D;
      Fp32::product(data_, packed_.proj_in, u, step, n, 0, packed_.proj_in.columns,
                    [&](int r, int rows, int c, int columns, const float* v, int stride) {
                      for (int i = 0; i < rows; ++i) copy(v + i * stride, h_ + (row + r + i) * width_ + c, columns);
                    });
    }
    for (int row = begin; row < end; ++row) {
      const int64_t sample = first_ + row / count;
      const int position = data_index(evaluated + row % count);
      float *h = h_ + row * width_, *other = h + static_cast<int64_t>(samples_) * count * width_;
      std::fill(h + s_.width, h + width_, 0.f);
      if (s_.pos_embed) add(data_ + packed_.pos_embed + position * padded_columns(s_.width), h, s_.width);
      if (condition_.guided) {
        copy(h, other, static_cast<int>(width_));
        if (condition_.null_added) add(condition_.null_added + sample * s_.width, other, s_.width);
      }
      if (condition_.added) add(condition_.added + sample * s_.width, h, s_.width);
    }
  }

  // The next `count` tokens of every sequence, at the cache's positions from `position` on: h in, h out, which
  // `project` may have to finish. The prefix is not rotated, and of it the last layer needs keys and values only.
  void layers(int position, int count, bool tokens) {
    const Tokens now{position, count, sequences_ * count, tokens};
    session_.rows(now.rows);
    unfinished_ = nullptr;
    if (tokens && now.rows <= kFewRows && pairs()) return layers_in_pairs(now);
    const int heads = s_.heads(), members = member_.count();
    const PackedLayer& at = packed_.layer;
    for (int j = 0; j < s_.layers; ++j) {
      const float* layer = data_ + packed_.first_layer + j * packed_.layer_size;
      const bool keys_only = !tokens && j == s_.layers - 1;
      if (own_heads()) {
        normalized(layer, at.norm1_weight, at.norm1_bias, now.rows,
                   [&](int part, const Value* y) { attend_own_heads(part, layer, j, y, now, keys_only); });
      } else {
        normalized(layer, at.norm1_weight, at.norm1_bias, now.rows, [&](int part, const Value* y) {
          multiply_part(part, layer, at.qkv, y, width_, now.rows, put_qkv());
        });
        member_.phase([&](int part) {
          const int units = sequences_ * heads;
          attend_units(units * part / members, units * (part + 1) / members, heads, 0, layer, j, now, keys_only);
        });
      }
      if (keys_only) return;
      add_product(layer, at.proj, attended_, width_, now.rows);
      normalized(layer, at.norm2_weight, at.norm2_bias, now.rows, [&](int part, const Value* y) {
        multiply_part(part, layer, at.fc1, y, width_, now.rows, put_hidden());
      });
      add_product(layer, at.fc2, hidden_, hidden_width_, now.rows);
    }
  }

  // raw = proj_out(h) of the rows [begin, end) of a share, and of the same rows of the unconditional sequences
  void project(int count, int begin, int end) {
    for (int64_t half = 0; half < (condition_.guided ? 2 : 1); ++half) {
      const int64_t first = half * samples_ * count + begin;
      for (int64_t row = first; unfinished_ && row < first + end - begin; ++row) {
        copy(own_h_ + row * width_, h_ + row * width_, static_cast<int>(width_));
        add_halves(unfinished_, row, h_ + row * width_);
      }
      Fp32::product(data_, packed_.proj_out, h_ + first * width_, width_, end - begin, 0, packed_.proj_out.columns,
                    [&](int r, int rows, int c, int columns, const float* v, int stride) {
                      for (int i = 0; i < rows; ++i)
                        copy(v + i * stride, raw_ + (first + r + i) * raw_width_ + c, columns);
                    });
    }
  }

  // The raw parameters of block token n from row `row` of `count` tokens a sample, after `project`: guided, in the
  // layout of the network.
  const float* raw(const AffineOptions& affine, int count, int row, int n) {
    float* raw = raw_ + row * raw_width_;
    if (!condition_.guided) return raw;
    const float* null_raw = raw + static_cast<int64_t>(samples_) * count * raw_width_;
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
  static void add_both(const float* a, const float* b, float* to, int n) {  // n: whole groups of columns
    for (int i = 0; i < n; i += kLanes) store(to + i, load(to + i) + (load(a + i) + load(b + i)));
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

  struct Tokens {  // that go through the layers together
    int position, count, rows;
    bool tokens;  // not the prefix
  };

  // Two members and few rows: two phases a layer in place of four. A part has its own heads and its own hidden units,
  // so it can multiply what it has made of them with its half of proj's and fc2's inputs before it needs the other's;
  // and its own copy of h, to which it adds both halves' sums.
  bool pairs() const { return member_.count() == 2 && s_.has_halves(); }

  void layers_in_pairs(const Tokens& now) {
    const PackedLayer& at = packed_.layer;
    const int fc1 = s_.fc1_rows() / 2;
    for (int j = 0; j < s_.layers; ++j) {
      const float* layer = data_ + packed_.first_layer + j * packed_.layer_size;
      member_.phase([&](int part) {
        float* h = own_h_ + part * kFewRows * width_;
        if (j == 0) std::memcpy(h, h_, sizeof(float) * now.rows * width_);
        const Value* y =
            normalized_sum(j == 0 ? nullptr : mlp_sums(), layer, at.norm1_weight, at.norm1_bias, now.rows, h);
        attend_own_heads(part, layer, j, y, now, false);
        half_product(part, layer, at.proj, attended_, width_, now.rows, attention_sums());
      });
      member_.phase([&](int part) {
        float* h = own_h_ + part * kFewRows * width_;
        const Value* y = normalized_sum(attention_sums(), layer, at.norm2_weight, at.norm2_bias, now.rows, h);
        P::product(layer, at.fc1, y, width_, now.rows, part * fc1, (part + 1) * fc1, put_hidden());
        half_product(part, layer, at.fc2, hidden_, hidden_width_, now.rows, mlp_sums());
      });
    }
    unfinished_ = mlp_sums();
  }

  // [part][kFewRows][width]
  float* attention_sums() const { return sums_; }
  float* mlp_sums() const { return sums_ + 2 * kFewRows * width_; }

  void half_product(int part, const float* layer, const PackedLinear& at, const Value* x, int64_t stride, int rows,
                    float* sums) const {
    const int half = at.second_half();
    P::product(layer, at, part * half, (part + 1) * half, x, stride, rows, 0, at.columns,
               put_sums(sums + part * kFewRows * width_));
  }

  void add_halves(const float* sums, int64_t row, float* h) const {
    add_both(sums + row * width_, sums + (kFewRows + row) * width_, h, static_cast<int>(width_));
  }

  // norm(h) after the sums, if there are any, were added to h
  const Value* normalized_sum(const float* sums, const float* layer, int64_t weight, int64_t bias, int rows, float* h) {
    Value* y = few_ + member_.me() * kFewRows * width_;
    for (int r = 0; r < rows; ++r) {
      if (sums) add_halves(sums, r, h + r * width_);
      normalize(layer, weight, bias, h + r * width_, y + r * width_);
    }
    return y;
  }

  bool own_heads() const { return s_.heads() % member_.count() == 0 && s_.head_dim % kTileColumns == 0; }

  void attend_own_heads(int part, const float* layer, int j, const Value* y, const Tokens& now, bool keys_only) {
    const int own = s_.heads() / member_.count(), columns = own * s_.head_dim;
    for (int i = 0; i < 3; ++i) {
      const int first = i * s_.width + part * columns;
      P::product(layer, packed_.layer.qkv, y, width_, now.rows, first, first + columns, put_qkv());
    }
    attend_units(0, sequences_ * own, own, part * own, layer, j, now, keys_only);
  }

  // Units of one head of one sequence: `heads` heads from first_head on of every sequence
  void attend_units(int first, int last, int heads, int first_head, const float* layer, int j, const Tokens& now,
                    bool keys_only) {
    const auto at = [&](int u) { return cache(j, u / heads, first_head + u % heads); };
    session_.rows(now.count);
    for (int u = first; u < last; ++u)
      attention(layer, u / heads, first_head + u % heads, at(u), at(u + 1 < last ? u + 1 : u), now.position, now.count,
                now.tokens, keys_only);
    session_.rows(now.rows);
  }

  auto put_qkv() const {
    return [this](int row, int n, int c, int columns, const float* v, int stride) {
      for (int r = 0; r < n; ++r) copy(v + r * stride, qkv_ + (row + r) * qkv_width_ + c, columns);
    };
  }
  auto put_sums(float* sums) const {
    return [this, sums](int row, int n, int c, int columns, const float* v, int stride) {
      columns = std::min<int>(columns, static_cast<int>(width_) - c);
      for (int r = 0; r < n; ++r) copy(v + r * stride, sums + (row + r) * width_ + c, columns);
    };
  }
  auto put_hidden() const {
    return [this](int row, int n, int c, int columns, const float* v, int stride) {
      for (int r = 0; r < n; ++r) gate(v + r * stride, row + r, c, columns);
    };
  }

  void normalize(const float* layer, int64_t weight, int64_t bias, const float* x, Value* y) const {
    if (s_.norm == Norm::layernorm)
      layer_norm(x, layer + weight, layer + bias, y, s_.width);
    else
      rms_norm(x, layer + weight, y, s_.width);
  }

  // The columns of a product that are part `part`: whole panels if they can be shared evenly.
  std::pair<int, int> part_columns(int part, const PackedLinear& at) const {
    const int members = member_.count();
    const int unit = at.columns % (kPanelColumns * members) == 0 ? kPanelColumns : kTileColumns;
    const int units = (at.columns + unit - 1) / unit;
    return {units * part / members * unit, std::min(units * (part + 1) / members * unit, at.columns)};
  }

  template <class Sink>
  void multiply_part(int part, const float* layer, const PackedLinear& at, const Value* x, int64_t stride, int rows,
                     Sink&& sink) const {
    const auto [first, last] = part_columns(part, at);
    if (first < last) P::product(layer, at, x, stride, rows, first, last, sink);
  }

  // h += x W^T + bias: the sums of each half of the inputs, added to one another, then to h
  void add_product(const float* layer, const PackedLinear& at, const Value* x, int64_t stride, int rows) {
    member_.phase([&](int part) {
      const auto [first, last] = part_columns(part, at);
      const int half = at.second_half();
      if (first >= last) return;
      if (half < at.in) P::product(layer, at, 0, half, x, stride, rows, first, last, put_sums(sums_));
      P::product(layer, at, half < at.in ? half : 0, at.in, x, stride, rows, first, last,
                 [&](int row, int n, int c, int columns, const float* v, int from) {
                   columns = std::min<int>(columns, static_cast<int>(width_) - c);
                   for (int r = 0; r < n; ++r) {
                     float* h = h_ + (row + r) * width_ + c;
                     if (half < at.in)
                       add_both(sums_ + (row + r) * width_ + c, v + r * from, h, columns);
                     else
                       add(v + r * from, h, columns);
                   }
                 });
    });
  }

  // A phase that needs norm(h): use(part, norm(h) [rows][width])
  template <class Use>
  void normalized(const float* layer, int64_t weight, int64_t bias, int rows, Use&& use) {
    const bool few = rows <= kFewRows;
    if (!few)
      member_.phase([&](int part) {
        const int members = member_.count();
        for (int r = rows * part / members; r < rows * (part + 1) / members; ++r)
          normalize(layer, weight, bias, h_ + r * width_, y_ + r * width_);
      });
    member_.phase([&](int part) {
      Value* y = few ? few_ + member_.me() * kFewRows * width_ : y_;
      for (int r = 0; few && r < rows; ++r) normalize(layer, weight, bias, h_ + r * width_, y + r * width_);
      use(part, y);
    });
  }

  void gate(const float* v, int row, int c, int columns) const {
    Value* hidden = hidden_ + row * hidden_width_;
    if (s_.gate == Gate::gelu) {
      columns = std::min<int>(columns, static_cast<int>(hidden_width_) - c);
      for (int i = 0; i < columns; i += kLanes)
        store(hidden + c + i, P::kPairs ? gelu_coarse(load(v + i)) : gelu(load(v + i)));
    } else {
      for (int i = 0; i < columns; i += 2 * kColumnGroup)
        for (int k = 0; k < kColumnGroup; k += kLanes) {
          const vfloat x = load(v + i + k);
          store(hidden + (c + i) / 2 + k, x * sigmoid(x) * load(v + i + kColumnGroup + k));
        }
    }
  }

  void attention(const float* layer, int sequence, int head, float* memory, const float* next, int position, int count,
                 bool tokens, bool keys_only) {
    const int d = s_.head_dim;
    const float temperature = unconditional(sequence) ? condition_.attn_temp : 1.f;
    const float scale = 1.f / (std::sqrt(static_cast<float>(d)) * temperature);
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
    Attention(cache_).attend_all(memory, next, position, count, rows, qkv_width_, scale,
                                 scores_ + member_.me() * scores_width_,
                                 attended_ + static_cast<int64_t>(sequence) * count * width_ + head * d, width_);
  }

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
  const float* unfinished_ = nullptr;  // after layers_in_pairs: both halves of what is still to be added to h

  // shared by the crew
  float* h_ = nullptr;    // [rows][width]  the residual stream
  float* qkv_ = nullptr;  // [rows][3 width]
  float* raw_ = nullptr;  // [rows][2D or D]
  Value *values_ = nullptr, *y_ = nullptr, *attended_ = nullptr, *hidden_ = nullptr;  // [rows][width], .., [F]
  float* own_h_ = nullptr;       // [part][kFewRows][width]  of layers_in_pairs
  float* sums_ = nullptr;        // [rows][width], or [of proj, of fc2][half][kFewRows][width], of halves of the inputs
  float* own_caches_ = nullptr;  // [sequence][layer][head][cache_.size()]
  // one for each member
  Value* few_ = nullptr;     // [kFewRows][width]  normalised
  float* scores_ = nullptr;  // [tokens]
};

}  // namespace biflow::cpu::BIFLOW_ISA
