// decode_block and pack_block on a GPU.
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cuda.h"
#include "decode_block_call.h"

namespace {

using biflow::DecodeBlockParams;
using biflow::Launch;
using biflow::OptionalTensor;
using biflow::Tensor;
using biflow::cuda::DecodePlan;

constexpr int64_t kMaxSize = int64_t{1} << 20;  // of batches and sequences

int64_t packed_block_size(std::vector<Tensor>, int64_t tokens, int64_t channels, int64_t width, int64_t layers,
                          int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm,
                          bool rope, bool pos_embed, bool start_token, bool shift_only, std::string precision) {
  const biflow::BlockShape s = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate,
                                                  qk_norm, rope, pos_embed, start_token, shift_only, precision);
  return biflow::packed_block(s, biflow::Target::cuda).size;
}

void pack_block_(std::vector<Tensor> weights, Tensor packed, int64_t tokens, int64_t channels, int64_t width,
                 int64_t layers, int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm,
                 bool rope, bool pos_embed, bool start_token, bool shift_only, std::string precision) {
  const biflow::BlockShape s = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate,
                                                  qk_norm, rope, pos_embed, start_token, shift_only, precision);
  const std::vector<biflow::PackedSource> to = biflow::checked_sources(weights, packed, s, biflow::Target::cuda);
  const Launch launch(packed);
  float* const at = static_cast<float*>(launch.updates(packed));
  for (size_t i = 0; i < to.size(); ++i) {
    const auto* from = static_cast<const float*>(launch.reads(weights[i]));
    Launch::check("pack_block", biflow::cuda::pack_source(to[i], from, at, launch.stream()));
  }
}

// From [persistent, row_tiles, blocks, splits, warps, norm_in_place].
DecodePlan given_plan(const std::vector<int64_t>& given) {
  STD_TORCH_CHECK(
      given.size() == 6,
      "decode_block: plan must be [persistent, row_tiles, blocks, splits, warps, norm_in_place] or [], got ",
      given.size(), " numbers");
  for (const int64_t n : given)
    STD_TORCH_CHECK(0 <= n && n < kMaxSize, "decode_block: plan must be numbers from 0 to 2^20, got ", n);
  DecodePlan plan;
  plan.persistent = given[0] != 0, plan.row_tiles = static_cast<int>(given[1]);
  plan.blocks = static_cast<int>(given[2]), plan.splits = static_cast<int>(given[3]);
  plan.warps = static_cast<int>(given[4]), plan.norm_in_place = given[5] != 0;
  return plan;
}

void check_size(int64_t batch, int64_t tokens) {
  STD_TORCH_CHECK(batch < kMaxSize && tokens < kMaxSize,
                  "decode_block: expected fewer than 2^20 samples and tokens, got ", batch, " and ", tokens);
}

void tell_reads(const Launch& launch, const OptionalTensor& t) {
  if (t.has_value()) launch.reads(*t);
}

void decode_block_(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                   OptionalTensor null_prefix, Tensor out, int64_t width, int64_t layers, int64_t head_dim,
                   int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed,
                   bool start_token, bool shift_only, std::string precision, std::string layout, std::string scale,
                   std::string clip, double clip_value, std::string clip_on, bool flip, double guidance,
                   std::string guide, bool anneal, double attn_temp, std::vector<int64_t> plan,
                   OptionalTensor workspace, int64_t phases) {
  check_size(z.size(0), z.size(1));
  const DecodeBlockParams p = biflow::decode_block_params(
      z, packed, added, prefix, null_added, null_prefix, out, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm,
      rope, pos_embed, start_token, shift_only, precision, layout, scale, clip, clip_value, clip_on, flip, guidance,
      guide, anneal, attn_temp, biflow::Target::cuda, &z);
  if (z.numel() == 0) return;
  const Launch launch(z);
  const DecodePlan how = plan.empty() ? biflow::cuda::decode_plan(p, biflow::cuda::decode_machine()) : given_plan(plan);
  const int64_t words = biflow::cuda::decode_buffers(p, how).words;
  Tensor memory = workspace.has_value() ? *workspace : torch::stable::new_empty(z, {words});
  biflow::check_tensor("decode_block", "workspace", memory, {memory.numel()}, &z);
  STD_TORCH_CHECK(memory.numel() >= words, "decode_block: workspace must have ", words, " elements, got ",
                  memory.numel());
  if (p.z == p.x) {
    launch.updates(out);
  } else {
    launch.reads(z), launch.writes(out);
  }
  launch.reads(packed);
  for (const OptionalTensor* t : {&added, &prefix, &null_added, &null_prefix}) tell_reads(launch, *t);
  for (const float* rows : {p.condition.added, p.condition.null_added})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows) % 8 == 0,
                    "decode_block: expected added and null_added at multiples of 8 bytes");
  auto* const scratch = static_cast<float*>(launch.scratch(memory));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(scratch) % 64 == 0, "decode_block: workspace must be 64-byte aligned");
  Launch::check("decode_block", biflow::cuda::decode_block(p, how, scratch, phases, launch.stream()));
}

Tensor decode_block(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                    OptionalTensor null_prefix, int64_t width, int64_t layers, int64_t head_dim, int64_t mlp_hidden,
                    std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed, bool start_token,
                    bool shift_only, std::string precision, std::string layout, std::string scale, std::string clip,
                    double clip_value, std::string clip_on, bool flip, double guidance, std::string guide, bool anneal,
                    double attn_temp) {
  Tensor out = torch::stable::empty_like(z);
  decode_block_(z, packed, added, prefix, null_added, null_prefix, out, width, layers, head_dim, mlp_hidden, norm, gate,
                qk_norm, rope, pos_embed, start_token, shift_only, precision, layout, scale, clip, clip_value, clip_on,
                flip, guidance, guide, anneal, attn_temp, {}, {}, -1);
  return out;
}

std::vector<int64_t> decode_block_buffers(int64_t batch, bool guided, int64_t prefix_tokens, int64_t tokens,
                                          int64_t channels, int64_t width, int64_t layers, int64_t head_dim,
                                          int64_t mlp_hidden, bool start_token, bool shift_only, std::string precision,
                                          std::vector<int64_t> plan, std::vector<int64_t> machine) {
  DecodeBlockParams p;
  p.shape = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, "rmsnorm", "gelu", false, false,
                               false, start_token, shift_only, precision);
  check_size(batch, tokens);
  STD_TORCH_CHECK(batch >= 1 && prefix_tokens >= 0, "decode_block: expected at least 1 sample, got ", batch);
  p.B = batch;
  p.condition.guided = guided, p.condition.prefix_tokens = static_cast<int>(prefix_tokens);
  static float never_read[2];
  p.z = never_read, p.x = never_read + 1;
  STD_TORCH_CHECK(machine.empty() || machine.size() == 3,
                  "decode_block_buffers: machine must be [multiprocessors, bytes of shared memory, cooperative] or "
                  "[], got ",
                  machine.size(), " numbers");
  biflow::cuda::DecodeMachine on;
  if (machine.empty())
    on = biflow::cuda::decode_machine();
  else
    on = {static_cast<int>(machine[0]), static_cast<size_t>(machine[1]), machine[2] != 0};
  const DecodePlan how = plan.empty() ? biflow::cuda::decode_plan(p, on) : given_plan(plan);
  const biflow::cuda::DecodeBuffers at = biflow::cuda::decode_buffers(p, how);
  return {how.persistent,
          how.row_tiles,
          how.blocks,
          how.splits,
          how.warps,
          how.norm_in_place,
          at.words,
          at.x,
          at.y,
          at.o,
          at.h,
          at.partial,
          at.lse,
          at.qkv,
          at.raw,
          at.cache,
          static_cast<int64_t>(biflow::cuda::decode_shared_bytes(p, how)),
          static_cast<int64_t>(on.shared)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(BIFLOW_LIBRARY, BIFLOW_CUDA_KEY, m) {
  m.impl("packed_block_size", TORCH_BOX(&packed_block_size));
  m.impl("pack_block_", TORCH_BOX(&pack_block_));
  m.impl("decode_block", TORCH_BOX(&decode_block));
  m.impl("decode_block_", TORCH_BOX(&decode_block_));
}

STABLE_TORCH_LIBRARY_IMPL(BIFLOW_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("decode_block_buffers", TORCH_BOX(&decode_block_buffers));
}
