#include "attention_short.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "cpu/isa.h"
#include "library.h"

namespace {

using biflow::AttentionShortParams;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const uint16_t* halves(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

// t as the kernels read it: its last stride is 1
Tensor readable(const char* what, const Tensor& t, const Tensor& q) {
  bool fits = t.dim() == 4 && t.scalar_type() == ScalarType::BFloat16;
  for (int64_t i = 0; fits && i < 4; ++i) fits = t.size(i) == q.size(i);
  STD_TORCH_CHECK(fits, "attention_short: ", what, " must be bfloat16 (B, H, T, d) like q");
  return t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

void strides(const Tensor& t, int64_t* to) {
  for (int i = 0; i < 3; ++i) to[i] = t.stride(i);
}

AttentionShortParams params(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale) {
  AttentionShortParams p;
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.d = q.size(3);
  STD_TORCH_CHECK(p.T > 0 && p.T <= biflow::kShortTokens && p.d > 0 && p.d <= biflow::kShortChannels &&
                      p.d % biflow::kShortMultiple == 0,
                  "attention_short: expected 0 < T <= ", biflow::kShortTokens, " and d = 32, 64, 96 or 128, got ", p.T,
                  " and ", p.d);
  STD_TORCH_CHECK(biflow::cpu::active_isa() == biflow::cpu::Isa::amx, "attention_short: this CPU has no tile products");
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(std::isfinite(p.scale), "attention_short: scale must be finite, got ", scale);
  p.q = halves(q), p.k = halves(k), p.v = halves(v);
  strides(q, p.q_stride), strides(k, p.k_stride), strides(v, p.v_stride);
  return p;
}

Tensor result(const Tensor& q) { return torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)}); }

template <class Kernel>
void run(const AttentionShortParams& p, Kernel kernel) {
  constexpr int64_t kGrain = 1 << 18;  // products' multiplications that a thread does at least
  torch::stable::parallel_for(0, p.B * p.H, 1 + kGrain / (p.T * p.T * p.d),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> attention_short(Tensor q_in, Tensor k_in, Tensor v_in, bool causal, double scale) {
  STD_TORCH_CHECK(q_in.dim() == 4, "attention_short: q must be bfloat16 (B, H, T, d)");
  const Tensor q = readable("q", q_in, q_in), k = readable("k", k_in, q_in), v = readable("v", v_in, q_in);
  AttentionShortParams p = params(q, k, v, causal, scale);
  Tensor o = result(q);
  Tensor lse = torch::stable::new_empty(q, {p.B, p.H, p.T}, ScalarType::Float);
  p.o = static_cast<uint16_t*>(o.mutable_data_ptr());
  p.lse = lse.mutable_data_ptr<float>();
#ifdef BIFLOW_X86
  run(p, &biflow::cpu::amx::attention_short);
#endif
  return {torch::stable::transpose(o, 1, 2), lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_short_backward(Tensor grad_in, Tensor q_in, Tensor k_in, Tensor v_in,
                                                            Tensor lse, bool causal, double scale) {
  STD_TORCH_CHECK(q_in.dim() == 4, "attention_short: q must be bfloat16 (B, H, T, d)");
  const Tensor q = readable("q", q_in, q_in), k = readable("k", k_in, q_in), v = readable("v", v_in, q_in);
  const Tensor grad = readable("the gradient", grad_in, q_in);
  AttentionShortParams p = params(q, k, v, causal, scale);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.dim() == 3 &&
                      lse.size(0) == p.B && lse.size(1) == p.H && lse.size(2) == p.T,
                  "attention_short: lse must be float32 (B, H, T), contiguous");
  p.grad_o = halves(grad);
  strides(grad, p.grad_stride);
  p.lse = const_cast<float*>(lse.const_data_ptr<float>());
  Tensor grads[] = {result(q), result(q), result(q)};
  p.grad_q = static_cast<uint16_t*>(grads[0].mutable_data_ptr());
  p.grad_k = static_cast<uint16_t*>(grads[1].mutable_data_ptr());
  p.grad_v = static_cast<uint16_t*>(grads[2].mutable_data_ptr());
#ifdef BIFLOW_X86
  run(p, &biflow::cpu::amx::attention_short_backward);
#endif
  for (Tensor& g : grads) g = torch::stable::transpose(g, 1, 2);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("attention_short", TORCH_BOX(&attention_short));
  m.impl("attention_short_backward", TORCH_BOX(&attention_short_backward));
}
