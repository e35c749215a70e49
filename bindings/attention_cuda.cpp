// attention_forward on a GPU. Inputs of any strides are taken: those whose rows the kernel cannot read by 16 bytes are
// copied.
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "attention.h"
#include "cuda.h"

namespace {

using biflow::AttentionParams;
using biflow::AttentionPlan;
using biflow::Launch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Channels side by side, every row 16-byte aligned.
bool readable(const Tensor& t) {
  if (t.stride(3) != 1 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i)
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  return true;
}

Tensor made_readable(const Tensor& t) {
  if (t.numel() == 0 || readable(t)) return t;
  const Tensor copy = torch::stable::contiguous(t);
  return readable(copy) ? copy : torch::stable::clone(copy);
}

biflow::HeadsView view(const Launch& launch, const Tensor& t) {
  return {launch.reads(t), t.stride(0), t.stride(1), t.stride(2)};
}

void check_device(const char* what, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.device() == q.device(), "attention_forward: ", what, " must be on the device of q");
}

// A contiguous, aligned tensor of floats on q's device, or none.
MaybeTensor floats(const char* what, const MaybeTensor& t, int64_t size, const Tensor& q) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == size, "attention_forward: ", what,
                  " must be float32 with ", size, " elements");
  check_device(what, *t, q);
  const Tensor c = torch::stable::contiguous(*t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c);
}

const float* data(const Launch& launch, const MaybeTensor& t) {
  return t.has_value() ? static_cast<const float*>(launch.reads(*t)) : nullptr;
}

Tensor attention_forward(Tensor q_in, Tensor k_in, Tensor v_in, bool causal, double scale, MaybeTensor mask_in,
                         MaybeTensor q_norm_in, MaybeTensor k_norm_in, double eps, MaybeTensor cos_in,
                         MaybeTensor sin_in, int64_t prefix, std::vector<int64_t> plan_in) {
  const ScalarType type = q_in.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "attention_forward: q must be bfloat16 or float16");
  STD_TORCH_CHECK(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4, "attention_forward: expected (B, H, T, d)");
  const int64_t B = q_in.size(0), H = q_in.size(1), Tq = q_in.size(2), Tk = k_in.size(2), d = q_in.size(3);
  for (const Tensor* t : {&k_in, &v_in})
    STD_TORCH_CHECK(t->scalar_type() == type && t->size(0) == B && t->size(1) == H && t->size(2) == Tk &&
                        t->size(3) == d && t->device() == q_in.device(),
                    "attention_forward: k and v must be (B, H, Tk, d) of q's dtype and device");
  STD_TORCH_CHECK(d == 32 || d == 64 || d == 128, "attention_forward: d must be 32, 64 or 128, got ", d);
  STD_TORCH_CHECK(Tq < kMaxTokens && Tk < kMaxTokens, "attention_forward: expected fewer than 2^30 tokens");
  STD_TORCH_CHECK(!causal || Tq <= Tk, "attention_forward: causal needs at least as many keys as queries, got ", Tq,
                  " queries and ", Tk, " keys");
  STD_TORCH_CHECK(scale > 1e-30 && scale < 1e30, "attention_forward: scale must be positive");
  STD_TORCH_CHECK(
      cos_in.has_value() == sin_in.has_value() && (!cos_in.has_value() || (Tq == Tk && 0 <= prefix && prefix <= Tq)),
      "attention_forward: cos goes with sin, for as many queries as keys");
  if (mask_in.has_value()) {
    STD_TORCH_CHECK(mask_in->scalar_type() == ScalarType::Bool && mask_in->dim() == 2 && mask_in->size(0) == B &&
                        mask_in->size(1) == Tk,
                    "attention_forward: mask must be bool (B, Tk)");
    check_device("mask", *mask_in, q_in);
  }

  Tensor out = torch::stable::new_empty(q_in, {B, Tq, H, d});
  if (out.numel() == 0) return out;
  const Launch launch(q_in);
  const Tensor q = made_readable(q_in), k = made_readable(k_in), v = made_readable(v_in);
  const MaybeTensor q_norm = floats("q_norm", q_norm_in, d, q), k_norm = floats("k_norm", k_norm_in, d, q);
  const MaybeTensor cos = floats("cos", cos_in, (Tq - prefix) * (d / 2), q);
  const MaybeTensor sin = floats("sin", sin_in, (Tq - prefix) * (d / 2), q);
  MaybeTensor mask;
  if (mask_in.has_value()) mask = torch::stable::contiguous(*mask_in);

  AttentionParams p;
  p.B = B, p.H = H, p.Tq = static_cast<int>(Tq), p.Tk = static_cast<int>(Tk), p.d = static_cast<int>(d);
  p.bf16 = type == ScalarType::BFloat16;
  p.q = view(launch, q), p.k = view(launch, k), p.v = view(launch, v);
  p.out = launch.writes(out);
  p.mask = mask.has_value() ? static_cast<const bool*>(launch.reads(*mask)) : nullptr;
  p.causal = causal, p.scale = static_cast<float>(scale);
  p.q_norm = data(launch, q_norm), p.k_norm = data(launch, k_norm), p.eps = static_cast<float>(eps);
  p.cos = data(launch, cos), p.sin = data(launch, sin), p.prefix = static_cast<int>(prefix);

  AttentionPlan plan;
  if (plan_in.empty()) {
    plan = biflow::cuda::attention_plan(p);
  } else {
    STD_TORCH_CHECK(plan_in.size() == 4, "attention_forward: plan must be [row_tiles, warps, blocks, stages] or []");
    plan.row_tiles = static_cast<int>(plan_in[0]), plan.warps = static_cast<int>(plan_in[1]);
    plan.blocks = static_cast<int>(plan_in[2]), plan.stages = static_cast<int>(plan_in[3]);
  }
  Launch::check("attention_forward", biflow::cuda::attention_forward(p, plan, launch.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(BIFLOW_LIBRARY, BIFLOW_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
}
