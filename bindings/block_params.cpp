#include "block_params.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "block_options.h"

namespace {

using biflow::OptionalTensor;
using biflow::Tensor;

constexpr int64_t kRows = 128;  // go through the layers together: their activations stay in the L2 cache

int64_t cache_words(const biflow::BlockShape& s, int prefix_tokens) {  // of one sequence
  return s.layers * s.heads() * biflow::CacheShape(s, prefix_tokens).size();
}

int64_t block_cache_size(int64_t prefix_tokens, int64_t tokens, int64_t width, int64_t layers, int64_t head_dim,
                         std::string precision) {
  const biflow::BlockShape s = biflow::make_shape(tokens, 1, width, layers, head_dim, 1, "rmsnorm", "gelu", false,
                                                  false, false, false, false, precision);
  STD_TORCH_CHECK(prefix_tokens >= 0, "block_cache_size: prefix_tokens must be >= 0, got ", prefix_tokens);
  return cache_words(s, static_cast<int>(prefix_tokens));
}

void block_params_(Tensor x, Tensor packed, OptionalTensor added, OptionalTensor prefix, OptionalTensor null_added,
                   OptionalTensor null_prefix, Tensor raw, OptionalTensor cache, int64_t start, int64_t stop,
                   int64_t width, int64_t layers, int64_t head_dim, int64_t mlp_hidden, std::string norm,
                   std::string gate, bool qk_norm, bool rope, bool pos_embed, bool start_token, bool shift_only,
                   std::string precision, std::string layout, bool flip, double guidance, std::string guide,
                   bool anneal, double attn_temp) {
  constexpr const char* kOp = "block_params";
  STD_TORCH_CHECK(x.dim() == 3, "block_params: x must be (B, T, D)");
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  biflow::check_tensor(kOp, "x", x, {B, T, D});
  biflow::BlockParamsParams p;
  p.shape = biflow::make_shape(T, D, width, layers, head_dim, mlp_hidden, norm, gate, qk_norm, rope, pos_embed,
                               start_token, shift_only, precision);
  biflow::check_tensor(kOp, "packed", packed, {biflow::packed_block(p.shape).size});
  biflow::check_tensor(kOp, "raw", raw, {B, T, p.shape.raw_columns()});
  p.affine = biflow::parse_affine(kOp, layout, "exp", "none", 0, "both", flip);
  p.condition = biflow::make_condition(kOp, p.shape, B, added, prefix, null_added, null_prefix, guidance, guide, anneal,
                                       attn_temp);
  STD_TORCH_CHECK(0 <= start && start < stop && stop <= T, "block_params: expected 0 <= start < stop <= ", T, ", got ",
                  start, " and ", stop);
  p.B = B;
  p.start = static_cast<int>(start), p.stop = static_cast<int>(stop);
  p.x = x.const_data_ptr<float>();
  p.packed = biflow::aligned(kOp, "packed", packed);
  p.raw = raw.mutable_data_ptr<float>();
  if (cache) {
    const int64_t sequences = B * (p.condition.guided ? 2 : 1);
    biflow::check_tensor(kOp, "cache", *cache, {sequences, cache_words(p.shape, p.condition.prefix_tokens)});
    p.cache = biflow::aligned(kOp, "cache", *cache);
  } else {
    STD_TORCH_CHECK(start == 0, "block_params: a window that starts at ", start, " needs a cache");
  }
  const int64_t rows = (stop - start) * (p.condition.guided ? 2 : 1);
  biflow::run_crews(p, rows, kRows, biflow::cpu::block_params_scratch, biflow::cpu::block_params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("block_params_", TORCH_BOX(&block_params_)); }

STABLE_TORCH_LIBRARY_IMPL(biflow, CompositeExplicitAutograd, m) {
  m.impl("block_cache_size", TORCH_BOX(&block_cache_size));
}
