#include "decode_block.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/activations.h"
#include "cpu/affine_math.h"
#include "cpu/attention_step.h"
#include "cpu/linear.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

constexpr int kPrefillRows = 48;  // prefix tokens go through the layers in groups of about so many rows

// One aligned piece of memory for everything a call keeps between steps.
class Scratch {
 public:
  float* take(int64_t floats) {  // counts while there is no memory yet
    float* at = memory_ ? memory_.get() + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return at;
  }
  void allocate() {
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(used_, 16) * sizeof(float))));
    if (!memory_) throw std::bad_alloc();
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t used_ = 0;
};

// Decodes up to max_samples samples together. A sequence is one sample under one condition: the conditional ones come
// first, then, with guidance, the unconditional ones; a row is one token of one sequence.
class Decoder {
 public:
  Decoder(const DecodeBlockParams& p, int max_samples)
      : p_(p),
        s_(p.shape),
        packed_(packed_block(p.shape)),
        cache_(s_.head_dim, p.prefix_tokens + s_.tokens),
        width_(padded_columns(s_.width)),
        qkv_width_(padded_columns(3 * s_.width)),
        hidden_width_(padded_columns(s_.fc1_columns())),
        raw_width_(padded_columns(s_.raw_columns())) {
    max_sequences_ = max_samples * (p.guided ? 2 : 1);
    max_rows_ = std::max(max_sequences_, std::min(kPrefillRows, max_sequences_ * p.prefix_tokens));
    take_scratch();
    scratch_.allocate();
    take_scratch();
  }

  void decode(int64_t first, int samples) {
    first_ = first;
    samples_ = samples;
    sequences_ = samples * (p_.guided ? 2 : 1);
    prefill();
    const int shift = s_.start_token ? 0 : 1;
    for (int n = 0; n < s_.tokens; ++n) {
      const int evaluated = n - shift;  // the token whose network output gives the parameters of token n
      if (evaluated >= 0) {
        embed(n, evaluated);
        run_layers(p_.prefix_tokens + evaluated, 1, data_index(evaluated));
        linear<Write::set>(p_.packed, packed_.proj_out, h_, width_, raw_, raw_width_, sequences_);
      }
      for (int b = 0; b < samples_; ++b) produce(n, b, evaluated >= 0);
    }
  }

 private:
  void take_scratch() {
    h_ = scratch_.take(max_rows_ * width_);
    y_ = scratch_.take(max_rows_ * width_);
    qkv_ = scratch_.take(max_rows_ * qkv_width_);
    attended_ = scratch_.take(max_rows_ * width_);
    hidden_ = scratch_.take(max_rows_ * hidden_width_);
    raw_ = scratch_.take(max_rows_ * raw_width_);
    a_ = scratch_.take(s_.channels);
    b_ = scratch_.take(s_.channels);
    scores_ = scratch_.take(static_cast<int64_t>(cache_.key_blocks) * kKeyBlock);
    caches_ = scratch_.take(static_cast<int64_t>(s_.layers) * max_sequences_ * s_.heads() * cache_.size());
  }

  int data_index(int n) const { return p_.affine.flip ? s_.tokens - 1 - n : n; }
  int64_t token(int b, int n) const { return ((first_ + b) * s_.tokens + data_index(n)) * s_.channels; }
  bool unconditional(int sequence) const { return sequence >= samples_; }
  int64_t sample(int sequence) const { return first_ + (unconditional(sequence) ? sequence - samples_ : sequence); }

  void prefill() {
    const int64_t row_size = s_.width;
    for (int t = 0, count; t < p_.prefix_tokens; t += count) {
      count = std::min(p_.prefix_tokens - t, max_rows_ / sequences_);
      for (int q = 0; q < sequences_; ++q) {
        const float* prefix = unconditional(q) ? p_.null_prefix : p_.prefix;
        for (int i = 0; i < count; ++i) {
          float* h = h_ + (q * count + i) * width_;
          std::memcpy(h, prefix + (sample(q) * p_.prefix_tokens + t + i) * row_size, sizeof(float) * row_size);
          std::fill(h + row_size, h + width_, 0.f);
        }
      }
      run_layers(t, count, -1);
    }
  }

  // h = proj_in(u) + position + class, u the token before token n (the start token for n = 0)
  void embed(int n, int evaluated) {
    const float* u = n == 0 ? p_.packed + packed_.start_token : p_.x + token(0, n - 1);
    const int64_t stride = n == 0 ? 0 : static_cast<int64_t>(s_.tokens) * s_.channels;
    linear<Write::set>(p_.packed, packed_.proj_in, u, stride, h_, width_, samples_);
    if (p_.guided) std::memcpy(h_ + samples_ * width_, h_, sizeof(float) * samples_ * width_);
    const float* position = p_.packed + packed_.pos_embed + data_index(evaluated) * width_;
    for (int q = 0; q < sequences_; ++q) {
      float* h = h_ + q * width_;
      const float* added = unconditional(q) ? p_.null_added : p_.added;
      if (s_.pos_embed)
        for (int i = 0; i < s_.width; ++i) h[i] += position[i];
      if (added)
        for (int i = 0; i < s_.width; ++i) h[i] += added[sample(q) * s_.width + i];
    }
  }

  void normalize(const float* layer, int64_t weight, int64_t bias, int rows) {
    for (int r = 0; r < rows; ++r) {
      const float* x = h_ + r * width_;
      float* y = y_ + r * width_;
      if (s_.norm == Norm::layernorm)
        layer_norm(x, layer + weight, layer + bias, y, s_.width);
      else
        rms_norm(x, layer + weight, y, s_.width);
    }
  }

  // The next `count` tokens of every sequence, at the cache's positions from `position` on: h in, h out. Row q * count
  // + i is token i of sequence q. rope_row: the row of the rotation tables, -1 for the prefix, which is not rotated and
  // of which the last layer needs keys and values only.
  void run_layers(int position, int count, int rope_row) {
    const int rows = sequences_ * count;
    for (int j = 0; j < s_.layers; ++j) {
      const float* layer = p_.packed + packed_.first_layer + j * packed_.layer_size;
      const PackedLayer& at = packed_.layer;
      normalize(layer, at.norm1_weight, at.norm1_bias, rows);
      linear<Write::set>(layer, at.qkv, y_, width_, qkv_, qkv_width_, rows);
      const bool keys_only = rope_row < 0 && j == s_.layers - 1;
      for (int q = 0; q < sequences_; ++q) attention(layer, j, q, position, count, rope_row, keys_only);
      if (keys_only) return;
      linear<Write::add>(layer, at.proj, attended_, width_, h_, width_, rows);
      normalize(layer, at.norm2_weight, at.norm2_bias, rows);
      linear<Write::set>(layer, at.fc1, y_, width_, hidden_, hidden_width_, rows);
      for (int r = 0; r < rows; ++r) {
        float* hidden = hidden_ + r * hidden_width_;
        s_.gate == Gate::swiglu ? swiglu(hidden, s_.mlp_hidden) : gelu(hidden, s_.mlp_hidden);
      }
      linear<Write::add>(layer, at.fc2, hidden_, hidden_width_, h_, width_, rows);
    }
  }

  void attention(const float* layer, int j, int sequence, int position, int count, int rope_row, bool keys_only) {
    const int d = s_.head_dim, heads = s_.heads();
    const float scale = 1.f / (std::sqrt(static_cast<float>(d)) * (unconditional(sequence) ? p_.attn_temp : 1.f));
    for (int i = 0; i < count; ++i) {
      const int64_t row = sequence * count + i;
      float* q = qkv_ + row * qkv_width_;
      for (int head = 0; head < heads; ++head, q += d) {
        float *k = q + s_.width, *v = k + s_.width;
        if (s_.qk_norm) {
          rms_norm(q, layer + packed_.layer.q_norm, q, d);
          rms_norm(k, layer + packed_.layer.k_norm, k, d);
        }
        if (s_.rope && rope_row >= 0) {
          const float* cosine = p_.packed + packed_.rope_cos + rope_row * (d / 2);
          const float* sine = p_.packed + packed_.rope_sin + rope_row * (d / 2);
          rotate(q, cosine, sine, d);
          rotate(k, cosine, sine, d);
        }
        float* cache = caches_ + ((static_cast<int64_t>(j) * sequences_ + sequence) * heads + head) * cache_.size();
        append(cache_, cache, position + i, k, v);
        if (keys_only) continue;
        // heads and sequences lie one after the other; the last one's `next` is not read, only fetched
        attend(cache_, cache, cache + cache_.size(), position + i + 1, q, scale, scores_,
               attended_ + row * width_ + head * d);
      }
    }
  }

  // x_n = z_n sigma(a) + b of sample b from its raw parameters (zeros where there are none yet), guided before the clip
  void produce(int n, int b, bool have_raw) {
    const int D = s_.channels;
    const float *raw = raw_ + b * raw_width_, *null_raw = raw_ + (samples_ + b) * raw_width_;
    const float g = p_.anneal ? p_.guidance * n / std::max(s_.tokens - 1, 1) : p_.guidance;
    const auto read = [&](float* to, int64_t at, int64_t stride, bool guide) {
      for (int i = 0; i < D; ++i, at += stride)
        to[i] = p_.guided && guide ? raw[at] + g * (raw[at] - null_raw[at]) : raw[at];
    };
    if (!have_raw || s_.shift_only) std::fill_n(a_, D, 0.f);
    if (!have_raw) {
      std::fill_n(b_, D, 0.f);
    } else if (s_.shift_only) {
      read(b_, 0, 1, p_.guide_b);
    } else {
      const bool interleaved = p_.affine.layout == Layout::interleaved;
      const bool shift_first = p_.affine.layout == Layout::shift_scale;
      read(a_, shift_first ? D : 0, interleaved ? 2 : 1, p_.guide_a);
      read(b_, shift_first ? 0 : interleaved ? 1 : D, interleaved ? 2 : 1, p_.guide_b);
    }
    affine_decode_row(p_.affine, a_, b_, p_.z + token(b, n), p_.x + token(b, n), D);
  }

  const DecodeBlockParams& p_;
  const BlockShape& s_;
  const PackedBlock packed_;
  const CacheShape cache_;
  const int64_t width_, qkv_width_, hidden_width_, raw_width_;  // row strides of the buffers below
  int max_sequences_ = 0, max_rows_ = 0;
  int64_t first_ = 0;
  int samples_ = 0, sequences_ = 0;

  Scratch scratch_;
  float* h_ = nullptr;         // [rows][width]      the residual stream; its padding stays 0
  float* y_ = nullptr;         // [rows][width]      normalised
  float* qkv_ = nullptr;       // [rows][3 width]
  float* attended_ = nullptr;  // [rows][width]
  float* hidden_ = nullptr;    // [rows][F or 2F]
  float* raw_ = nullptr;       // [sequences][2D or D]
  float *a_ = nullptr, *b_ = nullptr, *scores_ = nullptr;
  float* caches_ = nullptr;  // [layer][sequence][head][cache_.size()]
};

}  // namespace

void decode_block(const DecodeBlockParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t groups = (end - begin + kDecodeSamples - 1) / kDecodeSamples;
  const int64_t size = (end - begin + groups - 1) / groups;
  Decoder decoder(p, static_cast<int>(size));
  for (int64_t b = begin; b < end; b += size) decoder.decode(b, static_cast<int>(std::min(size, end - b)));
}

}  // namespace biflow::cpu::BIFLOW_ISA
