// decode_block_ and pack_block as torch ops, for any device: checks, the params struct.
#pragma once

#include <string>
#include <vector>

#include "block_options.h"
#include "decode_block.h"

namespace biflow {

// Where each of a block's tensors goes; they are float32, contiguous, of the right size, all on the device of packed.
inline std::vector<PackedSource> checked_sources(const std::vector<Tensor>& weights, const Tensor& packed,
                                                 const BlockShape& s, Target target) {
  check_tensor("pack_block", "packed", packed, {packed_block(s, target).size}, &packed);
  std::vector<PackedSource> to = packed_sources(s, target);
  STD_TORCH_CHECK(weights.size() == to.size(), "pack_block: expected ", to.size(), " tensors, got ", weights.size());
  for (size_t i = 0; i < to.size(); ++i) {
    const Tensor& w = weights[i];
    STD_TORCH_CHECK(
        w.scalar_type() == torch::headeronly::ScalarType::Float && w.is_contiguous() && w.device() == packed.device(),
        "pack_block: tensor ", i, " must be float32, contiguous, on the device of packed");
    STD_TORCH_CHECK(w.numel() == to[i].rows * to[i].columns, "pack_block: tensor ", i, " must have ",
                    to[i].rows * to[i].columns, " elements, got ", w.numel());
  }
  return to;
}

// The params of a call. like: z where its device is not the CPU.
inline DecodeBlockParams decode_block_params(
    const Tensor& z, const Tensor& packed, const OptionalTensor& added, const OptionalTensor& prefix,
    const OptionalTensor& null_added, const OptionalTensor& null_prefix, Tensor& out, int64_t width, int64_t layers,
    int64_t head_dim, int64_t mlp_hidden, const std::string& norm, const std::string& gate, bool qk_norm, bool rope,
    bool pos_embed, bool start_token, bool shift_only, const std::string& precision, const std::string& layout,
    const std::string& scale, const std::string& clip, double clip_value, const std::string& clip_on, bool flip,
    double guidance, const std::string& guide, bool anneal, double attn_temp, Target target, const Tensor* like) {
  constexpr const char* kOp = "decode_block";
  STD_TORCH_CHECK(z.dim() == 3, "decode_block: z must be (B, T, D)");
  const int64_t B = z.size(0), T = z.size(1), D = z.size(2);
  check_tensor(kOp, "z", z, {B, T, D}, like);
  check_tensor(kOp, "out", out, {B, T, D}, like);
  DecodeBlockParams p;
  p.shape = make_shape(T, D, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm, rope, pos_embed, start_token,
                       shift_only, precision);
  check_tensor(kOp, "packed", packed, {packed_block(p.shape, target).size}, like);
  p.affine = parse_affine(kOp, layout, scale, clip, clip_value, clip_on, flip);
  if (shift_only) p.affine.scale = ScaleMap::exp;  // its raw scale is 0: sigma = 1
  p.condition =
      make_condition(kOp, p.shape, B, added, prefix, null_added, null_prefix, guidance, guide, anneal, attn_temp, like);
  p.B = B;
  p.packed = aligned(kOp, "packed", packed);
  p.z = z.const_data_ptr<float>();
  p.x = out.mutable_data_ptr<float>();
  STD_TORCH_CHECK(p.z == p.x || p.z + z.numel() <= p.x || p.x + z.numel() <= p.z,
                  "decode_block: out must be z itself or not overlap it");
  return p;
}

}  // namespace biflow
