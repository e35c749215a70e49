#include "norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "options.h"

namespace {

using biflow::DType;
using biflow::Norm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeType = std::optional<ScalarType>;

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

Norm kind_of(const std::string& kind) { return biflow::parse<Norm>("norm", "kind", kind, {"layernorm", "rmsnorm"}); }

DType float_type(const char* what, const Tensor& t) {
  const DType type = biflow::dtype_of("norm", what, t);
  STD_TORCH_CHECK(type != DType::f64, "norm: ", what, " must be float32, bfloat16 or float16");
  return type;
}

const float* vector_of(const char* what, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == channels && t.is_contiguous(),
                  "norm: ", what, " must be float32 (", channels, ",) and contiguous");
  return t.const_data_ptr<float>();
}

int64_t channels_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) > 0, "norm: expected (..., C) with at least one channel");
  return t.size(t.dim() - 1);
}

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

std::tuple<Tensor, Tensor> run(const Tensor& x_in, const MaybeTensor& residual_in, const Tensor& weight,
                               const MaybeTensor& bias, const std::string& kind, double eps, MaybeType dtype) {
  biflow::NormParams p;
  const Tensor x = torch::stable::contiguous(x_in);
  p.channels = channels_of(x);
  p.rows = x.numel() / p.channels;
  p.kind = kind_of(kind);
  p.eps = biflow::narrowed("norm", "eps", eps, true);
  p.weight = vector_of("weight", weight, p.channels);
  if (bias.has_value()) p.bias = vector_of("bias", *bias, p.channels);
  Tensor y = torch::stable::new_empty(x, x.sizes(), dtype.has_value() ? *dtype : x.scalar_type());
  p.x = x.const_data_ptr(), p.x_type = float_type("x", x);
  p.y = y.mutable_data_ptr(), p.y_type = float_type("y", y);
  Tensor h = x, residual = x;
  if (residual_in.has_value()) {
    STD_TORCH_CHECK(same_shape(x, *residual_in), "norm: residual must have the shape of x");
    residual = torch::stable::contiguous(*residual_in);
    h = torch::stable::new_empty(x, x.sizes(), promoted(x.scalar_type(), residual.scalar_type()));
    p.residual = residual.const_data_ptr(), p.residual_type = float_type("residual", residual);
    p.h = h.mutable_data_ptr(), p.h_type = float_type("h", h);
  }
  torch::stable::parallel_for(0, p.rows, 1 + kGrain / p.channels,
                              [&](int64_t begin, int64_t end) { biflow::cpu::norm(p, begin, end); });
  return {y, h};
}

Tensor norm(Tensor x, Tensor weight, MaybeTensor bias, std::string kind, double eps, MaybeType dtype) {
  return std::get<0>(run(x, std::nullopt, weight, bias, kind, eps, dtype));
}

std::tuple<Tensor, Tensor> add_norm(Tensor x, Tensor residual, Tensor weight, MaybeTensor bias, std::string kind,
                                    double eps, MaybeType dtype) {
  return run(x, residual, weight, bias, kind, eps, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(Tensor grad_y_in, MaybeTensor grad_h_in, Tensor h_in,
                                                         Tensor weight, MaybeTensor bias, std::string kind, double eps,
                                                         MaybeType narrow_type) {
  biflow::NormGradParams p;
  const Tensor h = torch::stable::contiguous(h_in), grad_y = torch::stable::contiguous(grad_y_in);
  STD_TORCH_CHECK(same_shape(h, grad_y), "norm: the gradient must have the shape of y");
  p.channels = channels_of(h);
  p.rows = h.numel() / p.channels;
  p.kind = kind_of(kind);
  p.eps = biflow::narrowed("norm", "eps", eps, true);
  p.weight = vector_of("weight", weight, p.channels);
  p.h = h.const_data_ptr(), p.h_type = float_type("h", h);
  p.grad_y = grad_y.const_data_ptr(), p.y_type = float_type("the gradient", grad_y);
  MaybeTensor grad_h;
  if (grad_h_in.has_value()) {
    STD_TORCH_CHECK(same_shape(h, *grad_h_in) && grad_h_in->scalar_type() == h.scalar_type(),
                    "norm: the gradient of h must have its shape and dtype");
    grad_h = torch::stable::contiguous(*grad_h_in);
    p.grad_h = grad_h->const_data_ptr();
  }
  Tensor grad_x = torch::stable::new_empty(h, h.sizes());
  p.grad_x = grad_x.mutable_data_ptr();
  Tensor narrow =
      narrow_type.has_value() ? torch::stable::new_empty(h, h.sizes(), *narrow_type) : torch::stable::new_empty(h, {0});
  if (narrow_type.has_value()) p.narrow = narrow.mutable_data_ptr(), p.narrow_type = float_type("narrow", narrow);
  Tensor grad_weight = torch::stable::new_empty(weight, {p.channels});
  Tensor grad_bias = torch::stable::new_empty(weight, {bias.has_value() ? p.channels : 0});
  std::vector<float> partial(p.chunks() * 2 * p.channels);
  p.partial = partial.data();
  torch::stable::parallel_for(0, p.chunks(), 1 + kGrain / (p.channels * p.rows_per_chunk()),
                              [&](int64_t begin, int64_t end) { biflow::cpu::norm_backward(p, begin, end); });
  biflow::cpu::norm_weight_gradients(p, grad_weight.mutable_data_ptr<float>(),
                                     bias.has_value() ? grad_bias.mutable_data_ptr<float>() : nullptr);
  return {grad_x, narrow, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}
