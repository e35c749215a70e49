// A row is a few vectors in the L1 cache: it is converted into a scratch there, padded with zeros to whole vectors, and
// read from it as often as needed. Memory is touched once.
#include "norm.h"

#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

// Sum of f(i) over the vectors of a row of n elements; four sums side by side, for an addition takes four cycles.
template <class F>
BIFLOW_INLINE float sum_vectors(int64_t n, F&& f) {
  vfloat sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sum[k] += f(i + k * kLanes);
  for (; i < n; i += kLanes) sum[0] += f(i);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// h -> h - m in place, where m is the mean (LayerNorm) or 0; returns 1 / sqrt(s + eps).
inline float centre(Norm kind, float eps, float* h, int64_t n) {
  if (kind == Norm::layernorm) {
    const float mean = sum_vectors(n, [&](int64_t i) { return load(h + i); }) / n;
    for (int64_t i = 0; i < n; i += kLanes) store(h + i, load(h + i) - mean);
    for (int64_t i = n; i < padded(n); ++i) h[i] = 0;
  }
  return 1.f / std::sqrt(sum_vectors(n, [&](int64_t i) { return load(h + i) * load(h + i); }) / n + eps);
}

}  // namespace

void norm(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.channels;
  const Rows rows(n, 5);
  float *h = rows[0], *other = rows[1], *y = rows[2], *weight = rows[3], *bias = rows[4];
  read_row(DType::f32, p.weight, 0, n, weight);
  if (p.bias) read_row(DType::f32, p.bias, 0, n, bias);
  for (int64_t row = begin; row < end; ++row) {
    read_row(p.x_type, p.x, row, n, h);
    if (p.residual) {
      read_row(p.residual_type, p.residual, row, n, other);
      for (int64_t i = 0; i < n; i += kLanes) store(h + i, load(h + i) + load(other + i));
      write_row(p.h_type, h, p.h, row, n);
      if (p.h_type != DType::f32) read_row(p.h_type, p.h, row, n, h);  // as it was rounded
    }
    const float scale = centre(p.kind, p.eps, h, n);
    for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(h + i) * scale * load(weight + i) + load(bias + i));
    write_row(p.y_type, y, p.y, row, n);
  }
}

// With c = h - m, u = c scale and g = grad_y weight: the gradient of h is scale (g - u mean(g u) - mean(g)), without
// the last mean for RMSNorm; those of weight and bias are the sums over rows of grad_y u and grad_y.
void norm_backward(const NormGradParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.channels;
  const bool centred = p.kind == Norm::layernorm;
  const Rows rows(n, 6);
  float *h = rows[0], *grad = rows[1], *other = rows[2], *weight = rows[3];
  float *to_weight = rows[4], *to_bias = rows[5];
  read_row(DType::f32, p.weight, 0, n, weight);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    for (int64_t i = 0; i < n; i += kLanes) store(to_weight + i, vfloat{}), store(to_bias + i, vfloat{});
    const int64_t first = chunk * p.rows_per_chunk(), last = first + p.rows_per_chunk();
    for (int64_t row = first; row < last && row < p.rows; ++row) {
      read_row(p.h_type, p.h, row, n, h);
      read_row(p.y_type, p.grad_y, row, n, grad);
      const float scale = centre(p.kind, p.eps, h, n);
      vfloat along = {}, mean = {};
      for (int64_t i = 0; i < n; i += kLanes) {
        const vfloat u = load(h + i) * scale, gy = load(grad + i), g = gy * load(weight + i);
        store(to_weight + i, load(to_weight + i) + gy * u);
        store(to_bias + i, load(to_bias + i) + gy);
        store(h + i, u);
        store(grad + i, g);
        along += g * u;
        mean += g;
      }
      const float by = reduce_add(along) / n, less = centred ? reduce_add(mean) / n : 0.f;
      if (p.grad_h) {
        read_row(p.h_type, p.grad_h, row, n, other);
        for (int64_t i = 0; i < n; i += kLanes)
          store(grad + i, load(other + i) + scale * (load(grad + i) - load(h + i) * by - less));
      } else {
        for (int64_t i = 0; i < n; i += kLanes) store(grad + i, scale * (load(grad + i) - load(h + i) * by - less));
      }
      write_row(p.h_type, grad, p.grad_x, row, n);
      if (p.narrow) write_row(p.narrow_type, grad, p.narrow, row, n);
    }
    write_row(DType::f32, to_weight, p.partial, 2 * chunk, n);
    write_row(DType::f32, to_bias, p.partial, 2 * chunk + 1, n);
  }
}

void norm_weight_gradients(const NormGradParams& p, float* grad_weight, float* grad_bias) {
  const int64_t n = p.channels;
  for (int64_t part = 0; part < (grad_bias ? 2 : 1); ++part) {
    float* to = part ? grad_bias : grad_weight;
    each_vector<float>(n, [&](int64_t i, auto m) {
      vfloat sum = {};
      for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) sum += load_n(p.partial + (2 * chunk + part) * n + i, m);
      store_n(to + i, sum, m);
    });
  }
}

}  // namespace biflow::cpu::BIFLOW_ISA
