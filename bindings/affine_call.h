// affine_encode, affine_decode and their gradients as torch ops, for any device: checks, outputs, the params struct.
// Inputs of any strides are taken (copied if they must be), outputs are contiguous.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "affine.h"
#include "options.h"

namespace biflow {

// The inputs of a call, contiguous, and what the params struct says of them.
struct AffineCall {
  using Tensor = torch::stable::Tensor;
  using MaybeTensor = std::optional<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;

  Tensor input, params;
  MaybeTensor mask;
  AffineParams p;

  AffineCall(const Tensor& x, const Tensor& net, const MaybeTensor& m, const AffineOptions& options)
      : input(torch::stable::contiguous(x)), params(torch::stable::contiguous(net)) {
    STD_TORCH_CHECK(x.dim() == 3, "affine: expected (B, T, D), got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(
        net.dim() == 3 && net.size(0) == x.size(0) && net.size(1) == x.size(1) && net.size(2) == 2 * x.size(2),
        "affine: params must be (B, T, 2D)");
    p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
    p.data = dtype_of("affine", "x", x), p.net = dtype_of("affine", "params", net);
    STD_TORCH_CHECK((p.data == DType::f64) == (p.net == DType::f64), "affine: float64 goes with float64 only");
    check_device("params", net);
    p.options = options;
    if (m.has_value()) {
      STD_TORCH_CHECK(m->scalar_type() == ScalarType::Bool && m->dim() == 2 && m->size(0) == p.B && m->size(1) == p.T,
                      "affine: mask must be bool (B, T)");
      check_device("mask", *m);
      mask = torch::stable::contiguous(*m);
    }
  }

  void check_device(const char* what, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == input.device(), "affine: ", what, " must be on the device of x");
  }
  bool empty() const { return p.B * p.T * p.D == 0; }
  ScalarType logdet_type() const { return p.data == DType::f64 ? ScalarType::Double : ScalarType::Float; }
};

// The four ops on a Device, which is made of a tensor on it and has
//   const void* reads(const Tensor&), void* writes(Tensor&)       the memory of a tensor
//   static int64_t partials(const AffineParams&)                  doubles that p.partial needs
//   void forward(const AffineParams&, bool encode), void backward(const AffineParams&, bool encode)
template <class Device>
class AffineOps {
  using Tensor = AffineCall::Tensor;
  using MaybeTensor = AffineCall::MaybeTensor;

 public:
  static std::tuple<Tensor, Tensor> encode(Tensor x, Tensor params, std::string layout, std::string scale,
                                           std::string clip, double clip_value, std::string clip_on, bool causal,
                                           bool flip, MaybeTensor mask) {
    return forward({x, params, mask, options(layout, scale, clip, clip_value, clip_on, causal, flip)}, true, true);
  }

  static std::tuple<Tensor, Tensor> decode(Tensor z, Tensor params, std::string layout, std::string scale,
                                           std::string clip, double clip_value, std::string clip_on, bool causal,
                                           bool flip, MaybeTensor mask, bool return_logdet) {
    return forward({z, params, mask, options(layout, scale, clip, clip_value, clip_on, causal, flip)}, return_logdet,
                   false);
  }

  static std::tuple<Tensor, Tensor> encode_backward(Tensor grad_z, MaybeTensor grad_logdet, Tensor x, Tensor params,
                                                    std::string layout, std::string scale, std::string clip,
                                                    double clip_value, std::string clip_on, bool causal, bool flip,
                                                    MaybeTensor mask) {
    return backward({x, params, mask, options(layout, scale, clip, clip_value, clip_on, causal, flip)}, grad_z,
                    grad_logdet, true);
  }

  static std::tuple<Tensor, Tensor> decode_backward(Tensor grad_x, MaybeTensor grad_logdet, Tensor z, Tensor params,
                                                    std::string layout, std::string scale, std::string clip,
                                                    double clip_value, std::string clip_on, bool causal, bool flip,
                                                    MaybeTensor mask) {
    return backward({z, params, mask, options(layout, scale, clip, clip_value, clip_on, causal, flip)}, grad_x,
                    grad_logdet, false);
  }

 private:
  static AffineOptions options(const std::string& layout, const std::string& scale, const std::string& clip,
                               double clip_value, const std::string& clip_on, bool causal, bool flip) {
    AffineOptions o = parse_affine("affine", layout, scale, clip, clip_value, clip_on, flip);
    o.causal = causal;
    return o;
  }

  static void point_at_inputs(AffineCall& call, const Device& device) {
    call.p.input = device.reads(call.input);
    call.p.params = device.reads(call.params);
    if (call.mask.has_value()) call.p.mask = static_cast<const bool*>(device.reads(*call.mask));
  }

  static std::tuple<Tensor, Tensor> forward(AffineCall&& call, bool with_logdet, bool encode) {
    AffineParams& p = call.p;
    Tensor output = torch::stable::new_empty(call.input, {p.B, p.T, p.D});
    const int64_t samples = with_logdet ? p.B : 0;
    if (call.empty()) return {output, torch::stable::new_zeros(call.input, {samples}, call.logdet_type())};
    Tensor logdet = torch::stable::new_empty(call.input, {samples}, call.logdet_type());
    const int64_t sums = with_logdet ? Device::partials(p) : 0;
    Tensor partial = torch::stable::new_empty(call.input, {sums}, AffineCall::ScalarType::Double);
    const Device device(call.input);
    point_at_inputs(call, device);
    p.output = device.writes(output);
    if (with_logdet) {
      p.partial = static_cast<double*>(device.writes(partial));
      p.logdet = device.writes(logdet);
    }
    device.forward(p, encode);
    return {output, logdet};
  }

  static std::tuple<Tensor, Tensor> backward(AffineCall&& call, const Tensor& grad_output,
                                             const MaybeTensor& grad_logdet, bool encode) {
    AffineParams& p = call.p;
    STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == p.B && grad_output.size(1) == p.T &&
                        grad_output.size(2) == p.D && grad_output.scalar_type() == call.input.scalar_type(),
                    "affine: the gradient must have the shape and dtype of the output");
    call.check_device("the gradient", grad_output);
    Tensor grad_input = torch::stable::new_empty(call.input, {p.B, p.T, p.D});
    Tensor grad_params = torch::stable::new_empty(call.params, {p.B, p.T, 2 * p.D});
    if (call.empty()) return {grad_input, grad_params};
    const Tensor grad = torch::stable::contiguous(grad_output);
    MaybeTensor sums;
    if (grad_logdet.has_value()) {
      STD_TORCH_CHECK(
          grad_logdet->dim() == 1 && grad_logdet->size(0) == p.B && grad_logdet->scalar_type() == call.logdet_type(),
          "affine: the gradient of logdet must be (B,), float32 or float64 for float64 data");
      call.check_device("the gradient of logdet", *grad_logdet);
      sums = torch::stable::contiguous(*grad_logdet);
    }
    const Device device(call.input);
    point_at_inputs(call, device);
    p.grad_output = device.reads(grad);
    if (sums.has_value()) p.grad_logdet = device.reads(*sums);
    p.grad_input = device.writes(grad_input);
    p.grad_params = device.writes(grad_params);
    device.backward(p, encode);
    return {grad_input, grad_params};
  }
};

}  // namespace biflow
