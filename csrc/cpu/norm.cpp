// A row is a few vectors in the L1 cache: it is converted once, into a scratch there, and read from it as often as
// needed. Memory is touched once.
#include "norm.h"

#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

struct Moments {
  float mean, scale;  // m and 1 / sqrt(s + eps)
};

// Reads a row of h into c, as floats, and its moments. read(i, m): m elements of h from i on, zeros behind them.
template <class Read>
BIFLOW_INLINE Moments read_moments(Norm kind, float eps, int64_t n, float* c, Read&& read) {
  vfloat sum = {}, squares = {};
  if (kind == Norm::rmsnorm) {
    each_vector<float>(n, [&](int64_t i, auto m) {
      const vfloat v = read(i, m);
      store(c + i, v);
      squares += v * v;
    });
    return {0.f, 1.f / std::sqrt(reduce_add(squares) / n + eps)};
  }
  each_vector<float>(n, [&](int64_t i, auto m) {
    const vfloat v = read(i, m);
    store(c + i, v);
    sum += v;
  });
  const float mean = reduce_add(sum) / n;
  each_vector<float>(n, [&](int64_t i, auto m) {
    vfloat v;
    if constexpr (std::is_same_v<decltype(m), int>)
      v = load_partial(c + i, m, mean) - mean;  // 0 in the lanes behind n
    else
      v = load(c + i) - mean;
    squares += v * v;
  });
  return {mean, 1.f / std::sqrt(reduce_add(squares) / n + eps)};
}

template <class Element>
const Element* row_of(const void* base, int64_t row, int64_t n) {
  return static_cast<const Element*>(base) + row * n;
}
template <class Element>
Element* row_of(void* base, int64_t row, int64_t n) {
  return static_cast<Element*>(base) + row * n;
}

template <class X>
Moments read_x(const NormParams& p, int64_t row, float* c) {
  const X* x = row_of<X>(p.x, row, p.channels);
  return read_moments(p.kind, p.eps, p.channels, c, [&](int64_t i, auto m) { return load_n(x + i, m); });
}

template <class X, class R>
Moments read_sum(const NormParams& p, int64_t row, float* c) {
  using H = std::conditional_t<std::is_same_v<X, R>, X, float>;
  const X* x = row_of<X>(p.x, row, p.channels);
  const R* r = row_of<R>(p.residual, row, p.channels);
  H* h = row_of<H>(p.h, row, p.channels);
  return read_moments(p.kind, p.eps, p.channels, c, [&](int64_t i, auto m) {
    const vfloat v = load_n(x + i, m) + load_n(r + i, m);
    store_n(h + i, v, m);
    if constexpr (std::is_same_v<H, float>)
      return v;
    else
      return load_n(h + i, m);  // as it was rounded
  });
}

using Reader = Moments (*)(const NormParams&, int64_t, float*);

Reader reader_of(const NormParams& p) {
  Reader found = nullptr;
  with_float_type(p.x_type, [&](auto x) {
    if (!p.residual)
      found = &read_x<decltype(x)>;
    else
      with_float_type(p.residual_type, [&](auto r) { found = &read_sum<decltype(x), decltype(r)>; });
  });
  return found;
}

// A row of the gradients: c holds h on entry. With u = (h - m) scale and g = grad_y weight, h's gradient is
// scale (g - u mean(g u) - mean(g)), without the last mean for RMSNorm; grad_y u and grad_y are added to those of
// weight and bias.
template <class Y, class H>
void gradient_row(const NormGradParams& p, int64_t row, Moments of, float* c, float* grad, float* to_weight,
                  float* to_bias) {
  const int64_t n = p.channels;
  const Y* grad_y = row_of<Y>(p.grad_y, row, n);
  const vfloat scale = broadcast(of.scale), mean = broadcast(of.mean);
  vfloat along = {}, sum = {};
  each_vector<float>(n, [&](int64_t i, auto m) {  // lanes behind n have grad_y = 0
    const vfloat u = (load(c + i) - mean) * scale, gy = load_n(grad_y + i, m), g = gy * load_n(p.weight + i, m);
    store(to_weight + i, load(to_weight + i) + gy * u);
    store(to_bias + i, load(to_bias + i) + gy);
    store(c + i, u);
    store(grad + i, g);
    along += g * u;
    sum += g;
  });
  const float by = reduce_add(along) / n, less = p.kind == Norm::layernorm ? reduce_add(sum) / n : 0.f;
  H* to = row_of<H>(p.grad_x, row, n);
  if (p.grad_h) {
    const H* grad_h = row_of<H>(p.grad_h, row, n);
    each_vector<float>(n, [&](int64_t i, auto m) {
      store(grad + i, load_n(grad_h + i, m) + scale * (load(grad + i) - load(c + i) * by - less));
      store_n(to + i, load(grad + i), m);
    });
  } else {
    each_vector<float>(n, [&](int64_t i, auto m) {
      store(grad + i, scale * (load(grad + i) - load(c + i) * by - less));
      store_n(to + i, load(grad + i), m);
    });
  }
  if (p.narrow) write_row(p.narrow_type, grad, p.narrow, row, n);
}

}  // namespace

void norm(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.channels;
  const Rows rows(n, 2);
  float* c = rows[0];
  const float* bias = p.bias ? p.bias : rows[1];
  const Reader read = reader_of(p);
  with_float_type(p.y_type, [&](auto element) {
    using Y = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      const Moments of = read(p, row, c);
      const vfloat scale = broadcast(of.scale), mean = broadcast(of.mean);
      Y* y = row_of<Y>(p.y, row, n);
      each_vector<float>(n, [&](int64_t i, auto m) {
        store_n(y + i, (load(c + i) - mean) * scale * load_n(p.weight + i, m) + load_n(bias + i, m), m);
      });
    }
  });
}

void norm_backward(const NormGradParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.channels;
  const Rows rows(n, 4);
  float *c = rows[0], *grad = rows[1], *to_weight = rows[2], *to_bias = rows[3];
  with_float_type(p.h_type, [&](auto stream) {
    with_float_type(p.y_type, [&](auto result) {
      using H = decltype(stream);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t i = 0; i < n; i += kLanes) store(to_weight + i, vfloat{}), store(to_bias + i, vfloat{});
        const int64_t first = chunk * p.rows_per_chunk(), last = first + p.rows_per_chunk();
        for (int64_t row = first; row < last && row < p.rows; ++row) {
          const H* h = row_of<H>(p.h, row, n);
          const Moments of = read_moments(p.kind, p.eps, n, c, [&](int64_t i, auto m) { return load_n(h + i, m); });
          gradient_row<decltype(result), H>(p, row, of, c, grad, to_weight, to_bias);
        }
        write_row(DType::f32, to_weight, p.partial, 2 * chunk, n);
        write_row(DType::f32, to_bias, p.partial, 2 * chunk + 1, n);
      }
    });
  });
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
