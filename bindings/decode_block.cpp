#include "decode_block.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "block_options.h"

namespace {

using biflow::BlockShape;
using biflow::OptionalTensor;
using biflow::Tensor;

constexpr int64_t kRows = 64;  // go through the layers together: their activations stay in the L2 cache

Tensor pack_block(std::vector<Tensor> weights, int64_t tokens, int64_t channels, int64_t width, int64_t layers,
                  int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope,
                  bool pos_embed, bool start_token, bool shift_only, std::string precision) {
  const BlockShape s = biflow::make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm,
                                          rope, pos_embed, start_token, shift_only, precision);
  const int64_t count = biflow::packed_sources(s);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == count, "pack_block: expected ", count, " tensors, got ",
                  weights.size());
  std::vector<const float*> source;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& w = weights[i];
    STD_TORCH_CHECK(w.scalar_type() == torch::headeronly::ScalarType::Float && w.device().is_cpu() && w.is_contiguous(),
                    "pack_block: tensor ", i, " must be float32, contiguous, on the CPU");
    STD_TORCH_CHECK(w.numel() == biflow::packed_source_size(s, i), "pack_block: tensor ", i, " must have ",
                    biflow::packed_source_size(s, i), " elements, got ", w.numel());
    source.push_back(w.const_data_ptr<float>());
  }
  Tensor packed = torch::stable::new_empty(weights[0], {biflow::packed_block(s).size});
  biflow::pack_block(s, source.data(), packed.mutable_data_ptr<float>());
  return packed;
}

void decode_block_(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                   OptionalTensor null_prefix, Tensor out, int64_t width, int64_t layers, int64_t head_dim,
                   int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed,
                   bool start_token, bool shift_only, std::string precision, std::string layout, std::string scale,
                   std::string clip, double clip_value, std::string clip_on, bool flip, double guidance,
                   std::string guide, bool anneal, double attn_temp) {
  STD_TORCH_CHECK(z.dim() == 3, "decode_block: z must be (B, T, D)");
  const int64_t B = z.size(0), T = z.size(1), D = z.size(2);
  biflow::check_tensor("decode_block", "z", z, {B, T, D});
  biflow::check_tensor("decode_block", "out", out, {B, T, D});
  biflow::DecodeBlockParams p;
  p.shape = biflow::make_shape(T, D, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm, rope, pos_embed,
                               start_token, shift_only, precision);
  biflow::check_tensor("decode_block", "packed", packed, {biflow::packed_block(p.shape).size});
  p.affine = biflow::parse_affine("decode_block", layout, scale, clip, clip_value, clip_on, flip);
  if (shift_only) p.affine.scale = biflow::ScaleMap::exp;  // its raw scale is 0: sigma = 1
  p.condition = biflow::make_condition("decode_block", p.shape, B, added, prefix, null_added, null_prefix, guidance,
                                       guide, anneal, attn_temp);
  p.B = B;
  p.packed = biflow::aligned("decode_block", "packed", packed);
  p.z = z.const_data_ptr<float>();
  p.x = out.mutable_data_ptr<float>();
  STD_TORCH_CHECK(p.z == p.x || p.z + z.numel() <= p.x || p.x + z.numel() <= p.z,
                  "decode_block: out must be z itself or not overlap it");
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
                flip, guidance, guide, anneal, attn_temp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block));
  m.impl("decode_block", TORCH_BOX(&decode_block));
  m.impl("decode_block_", TORCH_BOX(&decode_block_));
}
