#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "decode_block_call.h"

namespace {

using biflow::BlockShape;
using biflow::OptionalTensor;
using biflow::Tensor;

constexpr int64_t kRows = 64;  // go through the layers together: their activations stay in the L2 cache

int64_t packed_block_size(std::vector<Tensor>, int64_t tokens, int64_t channels, int64_t width, int64_t layers,
                          int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm,
                          bool rope, bool pos_embed, bool start_token, bool shift_only, std::string precision) {
  const BlockShape s = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm,
                                          rope, pos_embed, start_token, shift_only, precision);
  return biflow::packed_block(s, biflow::Target::cpu).size;
}

void pack_block_(std::vector<Tensor> weights, Tensor packed, int64_t tokens, int64_t channels, int64_t width,
                 int64_t layers, int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm,
                 bool rope, bool pos_embed, bool start_token, bool shift_only, std::string precision) {
  const BlockShape s = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm,
                                          rope, pos_embed, start_token, shift_only, precision);
  STD_TORCH_CHECK(packed.device().is_cpu(), "pack_block: packed must be on the CPU");
  biflow::checked_sources(weights, packed, s, biflow::Target::cpu);
  std::vector<const float*> source;
  for (const Tensor& w : weights) source.push_back(w.const_data_ptr<float>());
  biflow::pack_block(s, source.data(), packed.mutable_data_ptr<float>());
}

void decode_block_(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                   OptionalTensor null_prefix, Tensor out, int64_t width, int64_t layers, int64_t head_dim,
                   int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed,
                   bool start_token, bool shift_only, std::string precision, std::string layout, std::string scale,
                   std::string clip, double clip_value, std::string clip_on, bool flip, double guidance,
                   std::string guide, bool anneal, double attn_temp, std::vector<int64_t> plan,
                   OptionalTensor workspace, int64_t phases) {
  STD_TORCH_CHECK(plan.empty() && !workspace.has_value() && phases < 0,
                  "decode_block: plan, workspace and phases are for CUDA tensors");
  const biflow::DecodeBlockParams p = biflow::decode_block_params(
      z, packed, added, prefix, null_added, null_prefix, out, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm,
      rope, pos_embed, start_token, shift_only, precision, layout, scale, clip, clip_value, clip_on, flip, guidance,
      guide, anneal, attn_temp, biflow::Target::cpu, nullptr);
  biflow::run_crews(p, p.condition.guided ? 2 : 1, kRows, biflow::cpu::decode_block_scratch, biflow::cpu::decode_block);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("packed_block_size", TORCH_BOX(&packed_block_size));
  m.impl("pack_block_", TORCH_BOX(&pack_block_));
  m.impl("decode_block", TORCH_BOX(&decode_block));
  m.impl("decode_block_", TORCH_BOX(&decode_block_));
}
