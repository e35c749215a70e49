#include "attention_heads.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "options.h"

namespace {

using biflow::DType;
using biflow::HeadsParams;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const float* floats(const char* what, const Tensor& t, int64_t rows, int64_t columns) {
  const bool fits =
      rows ? t.dim() == 2 && t.size(0) == rows && t.size(1) == columns : t.dim() == 1 && t.size(0) == columns;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && fits && t.is_contiguous(), "attention_heads: ", what,
                  " must be float32, contiguous and fit qkv");
  return t.const_data_ptr<float>();
}

// All but the heads' memory; qkv contiguous.
HeadsParams params(const Tensor& qkv, int64_t heads, const MaybeTensor& q_norm, const MaybeTensor& k_norm, double eps,
                   const MaybeTensor& cos, const MaybeTensor& sin, int64_t prefix) {
  HeadsParams p;
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0,
                  "attention_heads: qkv must be (B, T, 3 H d)");
  p.B = qkv.size(0), p.T = qkv.size(1), p.H = heads, p.d = qkv.size(2) / (3 * heads), p.prefix = prefix;
  STD_TORCH_CHECK(0 <= prefix && prefix <= p.T, "attention_heads: expected 0 <= prefix <= ", p.T, ", got ", prefix);
  p.eps = biflow::narrowed("attention_heads", "eps", eps, true);
  p.type = biflow::dtype_of("attention_heads", "qkv", qkv);
  STD_TORCH_CHECK(p.type != DType::f64, "attention_heads: qkv must be float32, bfloat16 or float16");
  p.qkv = qkv.const_data_ptr();
  if (q_norm.has_value()) p.norm[0] = floats("q_norm", *q_norm, 0, p.d);
  if (k_norm.has_value()) p.norm[1] = floats("k_norm", *k_norm, 0, p.d);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value() && (!cos.has_value() || p.d % 2 == 0),
                  "attention_heads: cos and sin go together, with an even d");
  if (cos.has_value() && prefix < p.T) {
    p.cos = floats("cos", *cos, p.T - prefix, p.d / 2);
    p.sin = floats("sin", *sin, p.T - prefix, p.d / 2);
  }
  return p;
}

void run(const HeadsParams& p, void (*kernel)(const HeadsParams&, int64_t, int64_t)) {
  if (p.H * p.d == 0) return;
  constexpr int64_t kGrain = 16384;  // elements a thread takes at least
  torch::stable::parallel_for(0, p.chunks(), 1 + kGrain / (p.tokens_per_chunk() * 3 * p.H * p.d),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> attention_heads(Tensor qkv_in, int64_t heads, MaybeTensor q_norm, MaybeTensor k_norm,
                                                   double eps, MaybeTensor cos, MaybeTensor sin, int64_t prefix) {
  const Tensor qkv = torch::stable::contiguous(qkv_in);
  HeadsParams p = params(qkv, heads, q_norm, k_norm, eps, cos, sin, prefix);
  const auto part = [&](int which) {
    Tensor head = torch::stable::new_empty(qkv, {p.B, p.T, p.H, p.d});
    p.head[which] = head.mutable_data_ptr();
    return torch::stable::transpose(head, 1, 2);
  };
  Tensor q = part(0), k = part(1), v = part(2);
  run(p, &biflow::cpu::heads);
  return {q, k, v};
}

std::tuple<Tensor, Tensor, Tensor> attention_heads_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv_in,
                                                            int64_t heads, MaybeTensor q_norm, MaybeTensor k_norm,
                                                            double eps, MaybeTensor cos, MaybeTensor sin,
                                                            int64_t prefix) {
  const Tensor qkv = torch::stable::contiguous(qkv_in);
  HeadsParams p = params(qkv, heads, q_norm, k_norm, eps, cos, sin, prefix);
  Tensor grads[] = {grad_q, grad_k, grad_v};
  for (int which = 0; which < 3; ++which) {
    Tensor& g = grads[which];
    STD_TORCH_CHECK(g.dim() == 4 && g.size(0) == p.B && g.size(1) == p.H && g.size(2) == p.T && g.size(3) == p.d &&
                        g.scalar_type() == qkv.scalar_type(),
                    "attention_heads: gradients must have the shape and dtype of the heads");
    if (p.d > 1 && g.stride(3) != 1) g = torch::stable::contiguous(g);
    p.grad_head[which] = g.const_data_ptr();
    p.stride[which][0] = g.stride(0), p.stride[which][1] = g.stride(2), p.stride[which][2] = g.stride(1);
  }
  Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  std::vector<float> partial(p.chunks() * 2 * p.d);
  p.partial = partial.data();
  run(p, &biflow::cpu::heads_backward);
  const auto weight_gradient = [&](int which) {
    Tensor grad = torch::stable::new_empty(qkv, {p.norm[which] ? p.d : 0}, ScalarType::Float);
    if (p.norm[which]) biflow::cpu::heads_norm_gradient(p, which, grad.mutable_data_ptr<float>());
    return grad;
  };
  Tensor to_q = weight_gradient(0), to_k = weight_gradient(1);
  return {grad_qkv, to_q, to_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("attention_heads", TORCH_BOX(&attention_heads));
  m.impl("attention_heads_backward", TORCH_BOX(&attention_heads_backward));
}
