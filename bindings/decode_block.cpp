#include "decode_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "options.h"

namespace {

using biflow::BlockShape;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_tensor(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, "decode_block: ", what, " must be float32");
  STD_TORCH_CHECK(t.device().is_cpu() && t.is_contiguous(), "decode_block: ", what, " must be contiguous, on the CPU");
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) same = same && t.size(i++) == n;
  STD_TORCH_CHECK(same, "decode_block: ", what, " has the wrong shape");
}

BlockShape make_shape(int64_t tokens, int64_t channels, int64_t width, int64_t layers, int64_t head_dim,
                      int64_t mlp_hidden, const std::string& norm, const std::string& gate, bool qk_norm, bool rope,
                      bool pos_embed, bool start_token, bool shift_only) {
  for (int64_t n : {tokens, channels, width, layers, head_dim, mlp_hidden})
    STD_TORCH_CHECK(n > 0 && n < (1 << 24), "decode_block: sizes must be positive and below 2^24, got ", n);
  STD_TORCH_CHECK(head_dim % 2 == 0 && head_dim <= 256, "decode_block: head_dim must be even and at most 256");
  STD_TORCH_CHECK(width % head_dim == 0, "decode_block: width must be a multiple of head_dim");
  BlockShape s;
  s.tokens = static_cast<int>(tokens), s.channels = static_cast<int>(channels), s.width = static_cast<int>(width);
  s.layers = static_cast<int>(layers), s.head_dim = static_cast<int>(head_dim);
  s.mlp_hidden = static_cast<int>(mlp_hidden);
  s.norm = biflow::parse<biflow::Norm>("decode_block", "norm", norm, {"layernorm", "rmsnorm"});
  s.gate = biflow::parse<biflow::Gate>("decode_block", "gate", gate, {"gelu", "swiglu"});
  s.qk_norm = qk_norm, s.rope = rope, s.pos_embed = pos_embed;
  s.start_token = start_token, s.shift_only = shift_only;
  return s;
}

Tensor pack_block(std::vector<Tensor> weights, int64_t tokens, int64_t channels, int64_t width, int64_t layers,
                  int64_t head_dim, int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope,
                  bool pos_embed, bool start_token, bool shift_only) {
  const BlockShape s = make_shape(tokens, channels, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm, rope,
                                  pos_embed, start_token, shift_only);
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

const float* optional_input(const char* what, const OptionalTensor& t, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_tensor(what, *t, shape);
  return t->const_data_ptr<float>();
}

void decode_block_(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                   OptionalTensor null_prefix, Tensor out, int64_t width, int64_t layers, int64_t head_dim,
                   int64_t mlp_hidden, std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed,
                   bool start_token, bool shift_only, std::string layout, std::string scale, std::string clip,
                   double clip_value, std::string clip_on, bool flip, double guidance, std::string guide, bool anneal,
                   double attn_temp) {
  STD_TORCH_CHECK(z.dim() == 3, "decode_block: z must be (B, T, D)");
  const int64_t B = z.size(0), T = z.size(1), D = z.size(2);
  check_tensor("z", z, {B, T, D});
  check_tensor("out", out, {B, T, D});
  biflow::DecodeBlockParams p;
  p.shape = make_shape(T, D, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm, rope, pos_embed, start_token,
                       shift_only);
  check_tensor("packed", packed, {biflow::packed_block(p.shape).size});
  p.affine = biflow::parse_affine("decode_block", layout, scale, clip, clip_value, clip_on, flip);
  if (shift_only) p.affine.scale = biflow::ScaleMap::exp;  // its raw scale is 0: sigma = 1
  STD_TORCH_CHECK(guidance >= 0 && attn_temp > 0, "decode_block: guidance must be >= 0 and attn_temp > 0");
  p.B = B;
  p.prefix_tokens = prefix && prefix->dim() == 3 ? static_cast<int>(prefix->size(1)) : 0;
  const int64_t S = p.prefix_tokens;
  p.added = optional_input("added", added, {B, width});
  p.prefix = optional_input("prefix", prefix, {B, S, width});
  p.guided = guidance > 0;
  if (p.guided) {
    p.null_added = optional_input("null_added", null_added, {B, width});
    p.null_prefix = optional_input("null_prefix", null_prefix, {B, S, width});
    STD_TORCH_CHECK(!p.prefix == !p.null_prefix, "decode_block: prefix and null_prefix go together");
  }
  p.guidance = static_cast<float>(guidance);
  p.guide_a = guide.find('a') != std::string::npos;
  p.guide_b = guide.find('b') != std::string::npos;
  p.anneal = anneal;
  p.attn_temp = static_cast<float>(attn_temp);
  p.packed = packed.const_data_ptr<float>();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.packed) % 64 == 0, "decode_block: packed must be 64-byte aligned");
  p.z = z.const_data_ptr<float>();
  p.x = out.mutable_data_ptr<float>();
  STD_TORCH_CHECK(p.z == p.x || p.z + z.numel() <= p.x || p.x + z.numel() <= p.z,
                  "decode_block: out must be z itself or not overlap it");
  // a thread reads all weights for its samples, so it should have two rows at least
  torch::stable::parallel_for(0, B, p.guided ? 1 : 2,
                              [&](int64_t begin, int64_t end) { biflow::cpu::decode_block(p, begin, end); });
}

Tensor decode_block(Tensor z, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                    OptionalTensor null_prefix, int64_t width, int64_t layers, int64_t head_dim, int64_t mlp_hidden,
                    std::string norm, std::string gate, bool qk_norm, bool rope, bool pos_embed, bool start_token,
                    bool shift_only, std::string layout, std::string scale, std::string clip, double clip_value,
                    std::string clip_on, bool flip, double guidance, std::string guide, bool anneal, double attn_temp) {
  Tensor out = torch::stable::empty_like(z);
  decode_block_(z, packed, added, prefix, null_added, null_prefix, out, width, layers, head_dim, mlp_hidden, norm, gate,
                qk_norm, rope, pos_embed, start_token, shift_only, layout, scale, clip, clip_value, clip_on, flip,
                guidance, guide, anneal, attn_temp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block));
  m.impl("decode_block", TORCH_BOX(&decode_block));
  m.impl("decode_block_", TORCH_BOX(&decode_block_));
}
