// A head's channels of one token are a few vectors: read as floats into a scratch that is padded with zeros, normalised
// and turned there, written once.
#include "attention_heads.h"

#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

template <std::size_t... I>
inline vfloat swapped_pairs(vfloat v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, static_cast<int>(I ^ 1)...);
}
// (a b c d ..) -> (b a d c ..)
inline vfloat swapped_pairs(vfloat v) { return swapped_pairs(v, std::make_index_sequence<kLanes>()); }

// What a thread needs: a row of channels, its gradient, a token's angles, the norms' weights and their gradients.
struct Scratch {
  explicit Scratch(int64_t d)
      : rows(d, 8),
        row(rows[0]),
        grad(rows[1]),
        cos(rows[2]),
        sin(rows[3]),
        weight{rows[4], rows[5]},
        sum{rows[6], rows[7]} {}
  Rows rows;
  float *row, *grad, *cos, *sin, *weight[2], *sum[2];
};

// cos and -sin, sin for each pair of channels, so that x turned = x cos + swapped x sin
void read_angles(const HeadsParams& p, int64_t token, Scratch& s) {
  const float *cos = p.cos + token * (p.d / 2), *sin = p.sin + token * (p.d / 2);
  for (int64_t i = 0; i < p.d / 2; ++i) {
    s.cos[2 * i] = s.cos[2 * i + 1] = cos[i];
    s.sin[2 * i] = -sin[i];
    s.sin[2 * i + 1] = sin[i];
  }
}

inline float inverse_rms(const float* x, int64_t n, float eps) {
  vfloat sum = {};
  for (int64_t i = 0; i < n; i += kLanes) sum += load(x + i) * load(x + i);
  return 1.f / std::sqrt(reduce_add(sum) / n + eps);
}

template <class F>
void each_token(const HeadsParams& p, int64_t chunk, F&& f) {  // f(sample, token, row of the (B T) rows)
  const int64_t first = chunk * p.tokens_per_chunk(), last = first + p.tokens_per_chunk();
  for (int64_t row = first; row < last && row < p.B * p.T; ++row) f(row / p.T, row % p.T, row);
}

void read_weights(const HeadsParams& p, Scratch& s) {
  for (int which = 0; which < 2; ++which)
    if (p.norm[which]) read_row(DType::f32, p.norm[which], 0, p.d, s.weight[which]);
}

}  // namespace

void heads(const HeadsParams& p, int64_t begin, int64_t end) {
  Scratch s(p.d);
  read_weights(p, s);
  const int64_t d = p.d;
  for (int64_t chunk = begin; chunk < end; ++chunk)
    each_token(p, chunk, [&](int64_t, int64_t token, int64_t row) {
      const bool turned = p.cos && token >= p.prefix;
      if (turned) read_angles(p, token - p.prefix, s);
      for (int which = 0; which < 3; ++which)
        for (int64_t head = 0; head < p.H; ++head) {
          read_row(p.type, p.qkv, (row * 3 + which) * p.H + head, d, s.row);
          if (which < 2 && p.norm[which]) {
            const float scale = inverse_rms(s.row, d, p.eps);
            const float* weight = s.weight[which];
            for (int64_t i = 0; i < d; i += kLanes) store(s.row + i, load(s.row + i) * scale * load(weight + i));
          }
          if (which < 2 && turned)
            for (int64_t i = 0; i < d; i += kLanes) {
              const vfloat x = load(s.row + i);
              store(s.row + i, x * load(s.cos + i) + swapped_pairs(x) * load(s.sin + i));
            }
          write_row(p.type, s.row, p.head[which], row * p.H + head, d);
        }
    });
}

// The turn's gradient is the turn back. With u = x scale and g = gradient weight: x's is scale (g - u mean(g u)), the
// weight's is the sum of gradient u.
void heads_backward(const HeadsParams& p, int64_t begin, int64_t end) {
  Scratch s(p.d);
  read_weights(p, s);
  const int64_t d = p.d, size = p.type == DType::f32 ? 4 : 2;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for (int64_t i = 0; i < d; i += kLanes) store(s.sum[0] + i, vfloat{}), store(s.sum[1] + i, vfloat{});
    each_token(p, chunk, [&](int64_t sample, int64_t token, int64_t row) {
      const bool turned = p.cos && token >= p.prefix;
      if (turned) read_angles(p, token - p.prefix, s);
      for (int which = 0; which < 3; ++which)
        for (int64_t head = 0; head < p.H; ++head) {
          const int64_t *stride = p.stride[which], at = (row * 3 + which) * p.H + head;
          const int64_t offset = sample * stride[0] + token * stride[1] + head * stride[2];
          read_row(p.type, static_cast<const char*>(p.grad_head[which]) + offset * size, 0, d, s.grad);
          if (which < 2 && turned)
            for (int64_t i = 0; i < d; i += kLanes) {
              const vfloat g = load(s.grad + i);
              store(s.grad + i, g * load(s.cos + i) - swapped_pairs(g) * load(s.sin + i));
            }
          if (which < 2 && p.norm[which]) {
            read_row(p.type, p.qkv, at, d, s.row);
            const float scale = inverse_rms(s.row, d, p.eps);
            vfloat along = {};
            for (int64_t i = 0; i < d; i += kLanes) {
              const vfloat u = load(s.row + i) * scale, gradient = load(s.grad + i);
              const vfloat g = gradient * load(s.weight[which] + i);
              store(s.sum[which] + i, load(s.sum[which] + i) + gradient * u);
              store(s.row + i, u);
              store(s.grad + i, g);
              along += g * u;
            }
            const float by = reduce_add(along) / d;
            for (int64_t i = 0; i < d; i += kLanes)
              store(s.grad + i, scale * (load(s.grad + i) - load(s.row + i) * by));
          }
          write_row(p.type, s.grad, p.grad_qkv, at, d);
        }
    });
    for (int which = 0; which < 2; ++which)
      if (p.norm[which]) write_row(DType::f32, s.sum[which], p.partial, 2 * chunk + which, d);
  }
}

void heads_norm_gradient(const HeadsParams& p, int which, float* grad) {
  each_vector<float>(p.d, [&](int64_t i, auto m) {
    vfloat sum = {};
    for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) sum += load_n(p.partial + (2 * chunk + which) * p.d + i, m);
    store_n(grad + i, sum, m);
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
