// affine_encode, affine_decode and their gradients on a CPU. Inputs of any strides are taken (copied if they must be),
// outputs are contiguous.
#include "affine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "options.h"

namespace {

using biflow::AffineParams;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

biflow::DType dtype_of(const char* what, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return biflow::DType::f32;
    case ScalarType::BFloat16:
      return biflow::DType::bf16;
    case ScalarType::Half:
      return biflow::DType::f16;
    case ScalarType::Double:
      return biflow::DType::f64;
    default:
      STD_TORCH_CHECK(false, "affine: ", what, " must be float32, bfloat16, float16 or float64");
  }
  return biflow::DType::f32;
}

biflow::AffineOptions make_options(const std::string& layout, const std::string& scale, const std::string& clip,
                                   double clip_value, const std::string& clip_on, bool causal, bool flip) {
  biflow::AffineOptions o = biflow::parse_affine("affine", layout, scale, clip, clip_value, clip_on, flip);
  o.causal = causal;
  return o;
}

// The inputs of a call, contiguous, and the params struct that points at them.
struct Call {
  Tensor input, params;
  MaybeTensor mask;
  AffineParams p;

  Call(const Tensor& x, const Tensor& net, const MaybeTensor& m, const biflow::AffineOptions& options)
      : input(torch::stable::contiguous(x)), params(torch::stable::contiguous(net)) {
    STD_TORCH_CHECK(x.dim() == 3, "affine: expected (B, T, D), got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(
        net.dim() == 3 && net.size(0) == x.size(0) && net.size(1) == x.size(1) && net.size(2) == 2 * x.size(2),
        "affine: params must be (B, T, 2D)");
    p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
    p.data = dtype_of("x", x), p.net = dtype_of("params", net);
    STD_TORCH_CHECK((p.data == biflow::DType::f64) == (p.net == biflow::DType::f64),
                    "affine: float64 goes with float64 only");
    p.options = options;
    p.input = input.const_data_ptr();
    p.params = params.const_data_ptr();
    if (m.has_value()) {
      STD_TORCH_CHECK(m->scalar_type() == ScalarType::Bool && m->dim() == 2 && m->size(0) == p.B && m->size(1) == p.T,
                      "affine: mask must be bool (B, T)");
      mask = torch::stable::contiguous(*m);
      p.mask = static_cast<const bool*>(mask->const_data_ptr());
    }
  }

  bool empty() const { return p.B * p.T * p.D == 0; }
  ScalarType logdet_type() const { return p.data == biflow::DType::f64 ? ScalarType::Double : ScalarType::Float; }
};

constexpr int64_t kGrain = 4;  // chunks a thread takes at least, about 32K elements

template <class Kernel>
std::tuple<Tensor, Tensor> forward(Call&& call, bool with_logdet, Kernel kernel) {
  AffineParams& p = call.p;
  Tensor output = torch::stable::new_empty(call.input, {p.B, p.T, p.D});
  const int64_t samples = with_logdet ? p.B : 0;
  if (call.empty()) return {output, torch::stable::new_zeros(call.input, {samples}, call.logdet_type())};
  Tensor logdet = torch::stable::new_empty(call.input, {samples}, call.logdet_type());
  Tensor partial = torch::stable::new_empty(call.input, {with_logdet ? p.chunks() : 0}, ScalarType::Double);
  p.output = output.mutable_data_ptr();
  if (with_logdet) {
    p.partial = static_cast<double*>(partial.mutable_data_ptr());
    p.logdet = logdet.mutable_data_ptr();
  }
  torch::stable::parallel_for(0, p.chunks(), kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  if (with_logdet) biflow::cpu::affine_logdet(p);
  return {output, logdet};
}

template <class Kernel>
std::tuple<Tensor, Tensor> backward(Call&& call, const Tensor& grad_output, const MaybeTensor& grad_logdet,
                                    Kernel kernel) {
  AffineParams& p = call.p;
  STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == p.B && grad_output.size(1) == p.T &&
                      grad_output.size(2) == p.D && grad_output.scalar_type() == call.input.scalar_type(),
                  "affine: the gradient must have the shape and dtype of the output");
  Tensor grad_input = torch::stable::new_empty(call.input, {p.B, p.T, p.D});
  Tensor grad_params = torch::stable::new_empty(call.params, {p.B, p.T, 2 * p.D});
  if (call.empty()) return {grad_input, grad_params};
  const Tensor grad = torch::stable::contiguous(grad_output);
  MaybeTensor sums;
  if (grad_logdet.has_value()) {
    STD_TORCH_CHECK(
        grad_logdet->dim() == 1 && grad_logdet->size(0) == p.B && grad_logdet->scalar_type() == call.logdet_type(),
        "affine: the gradient of logdet must be (B,), float32 or float64 for float64 data");
    sums = torch::stable::contiguous(*grad_logdet);
    p.grad_logdet = sums->const_data_ptr();
  }
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  p.grad_params = grad_params.mutable_data_ptr();
  torch::stable::parallel_for(0, p.chunks(), kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {grad_input, grad_params};
}

std::tuple<Tensor, Tensor> affine_encode(Tensor x, Tensor params, std::string layout, std::string scale,
                                         std::string clip, double clip_value, std::string clip_on, bool causal,
                                         bool flip, MaybeTensor mask) {
  const auto options = make_options(layout, scale, clip, clip_value, clip_on, causal, flip);
  return forward(Call(x, params, mask, options), true, &biflow::cpu::affine_encode);
}

std::tuple<Tensor, Tensor> affine_decode(Tensor z, Tensor params, std::string layout, std::string scale,
                                         std::string clip, double clip_value, std::string clip_on, bool causal,
                                         bool flip, MaybeTensor mask, bool return_logdet) {
  const auto options = make_options(layout, scale, clip, clip_value, clip_on, causal, flip);
  return forward(Call(z, params, mask, options), return_logdet, &biflow::cpu::affine_decode);
}

std::tuple<Tensor, Tensor> affine_encode_backward(Tensor grad_z, MaybeTensor grad_logdet, Tensor x, Tensor params,
                                                  std::string layout, std::string scale, std::string clip,
                                                  double clip_value, std::string clip_on, bool causal, bool flip,
                                                  MaybeTensor mask) {
  const auto options = make_options(layout, scale, clip, clip_value, clip_on, causal, flip);
  return backward(Call(x, params, mask, options), grad_z, grad_logdet, &biflow::cpu::affine_encode_backward);
}

std::tuple<Tensor, Tensor> affine_decode_backward(Tensor grad_x, MaybeTensor grad_logdet, Tensor z, Tensor params,
                                                  std::string layout, std::string scale, std::string clip,
                                                  double clip_value, std::string clip_on, bool causal, bool flip,
                                                  MaybeTensor mask) {
  const auto options = make_options(layout, scale, clip, clip_value, clip_on, causal, flip);
  return backward(Call(z, params, mask, options), grad_x, grad_logdet, &biflow::cpu::affine_decode_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("affine_encode", TORCH_BOX(&affine_encode));
  m.impl("affine_decode", TORCH_BOX(&affine_decode));
  m.impl("affine_encode_backward", TORCH_BOX(&affine_encode_backward));
  m.impl("affine_decode_backward", TORCH_BOX(&affine_decode_backward));
}
