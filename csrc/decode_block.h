// The exact sequential inverse of one flow block: T steps of a causal transformer over a static KV cache, fp32.
// Maths: biflow/ops/decode_block.py. Shapes: B samples, T tokens, D channels, C width, d head_dim, H = C / d heads,
// F mlp_hidden, L layers, S prefix tokens.
#pragma once

#include <cstdint>

#include "affine.h"
#include "cpu/isa.h"

namespace biflow {

enum class Norm : int { layernorm, rmsnorm };  // eps 1e-5, weight and bias | eps 1e-6, weight
enum class Gate : int { gelu, swiglu };        // gelu(fc1 x) | silu(first half of fc1 x) * second half

// What decides the packed layout.
struct BlockShape {
  int tokens = 0, channels = 0, width = 0, layers = 0, head_dim = 0, mlp_hidden = 0;
  Norm norm = Norm::layernorm;
  Gate gate = Gate::gelu;
  bool qk_norm = false, rope = false, pos_embed = true, start_token = false, shift_only = false;

  int heads() const { return width / head_dim; }
  int fc1_columns() const { return gate == Gate::swiglu ? 2 * mlp_hidden : mlp_hidden; }
  int raw_columns() const { return shift_only ? channels : 2 * channels; }
};

// ---- Packed weights: one array of floats that the step reads front to back.
//
// A linear layer (out, in) is stored by columns of its transpose: panels of kPanelColumns outputs (the last one may be
// narrower), each [in][columns of the panel], then the bias [columns]. Columns are padded with zeros to a multiple of
// kColumnGroup. Every piece starts on a 64-byte boundary.
// The order is that of the fields of PackedBlock, the layers one after the other in the order of PackedLayer.
constexpr int kPanelColumns = 64;
constexpr int kColumnGroup = 16;

static constexpr int64_t padded_columns(int64_t n) { return (n + kColumnGroup - 1) / kColumnGroup * kColumnGroup; }

struct PackedLinear {
  int64_t weight = 0, bias = 0;  // offsets in floats; inside a layer, from the layer's start
  int in = 0, out = 0;
};

struct PackedLayer {
  int64_t norm1_weight = 0, norm1_bias = 0;  // [C]; the bias only with layernorm
  PackedLinear qkv;                          // (3C, C)
  int64_t q_norm = 0, k_norm = 0;            // [d], with qk_norm
  PackedLinear proj;                         // (C, C)
  int64_t norm2_weight = 0, norm2_bias = 0;  // [C]
  PackedLinear fc1, fc2;                     // (F or 2F, C), (C, F)
};

struct PackedBlock {
  PackedLinear proj_in;  // (C, D)
  PackedLayer layer;     // of every layer, from its own start
  int64_t first_layer = 0, layer_size = 0;
  PackedLinear proj_out;               // (2D or D, C)
  int64_t pos_embed = 0;               // [T][padded C], rows in data order
  int64_t start_token = 0;             // [D]
  int64_t rope_cos = 0, rope_sin = 0;  // [T][d / 2], rows in data order
  int64_t size = 0;                    // of it all
};

PackedBlock packed_block(const BlockShape& s);

// source: the state_dict's tensors, contiguous, in the order proj_in.weight, .bias, [pos_embed], [start_token],
// [rope_cos, rope_sin], then per layer norm1.weight, [norm1.bias], qkv.weight, .bias, [q_norm.weight, k_norm.weight],
// proj.weight, .bias, norm2.weight, [norm2.bias], fc1.weight, .bias, fc2.weight, .bias, and last proj_out.weight, .bias
// ([] where configured); packed: packed_block(s).size floats, 64-byte aligned.
void pack_block(const BlockShape& s, const float* const* source, float* packed);
int64_t packed_sources(const BlockShape& s);                     // how many tensors that is
int64_t packed_source_size(const BlockShape& s, int64_t index);  // the number of elements of one

// ---- One call: all T tokens of B samples.
struct DecodeBlockParams {
  BlockShape shape;
  AffineOptions affine;  // layout, scale, clip, flip; `causal` is not read. With shift_only: exp, scale 1
  int64_t B = 0;
  int prefix_tokens = 0;               // S
  const float* z = nullptr;            // (B, T, D)
  const float* packed = nullptr;       // 64-byte aligned
  const float* added = nullptr;        // (B, C) or null: added to every token
  const float* prefix = nullptr;       // (B, S, C) or null: tokens before the first, without position
  float* x = nullptr;                  // (B, T, D); may be z
  bool guided = false;                 // a second, unconditional pass beside the first:
  const float* null_added = nullptr;   // (B, C) or null
  const float* null_prefix = nullptr;  // (B, S, C), null iff prefix is
  float guidance = 0;                  // g: raw += g (raw - raw of the unconditional pass)
  bool guide_a = true, guide_b = true,
       anneal = true;   // of the raw scale, of the raw shift; g n / max(T - 1, 1) for token n
  float attn_temp = 1;  // divides the attention logits of the unconditional pass
};

namespace cpu {
constexpr int kDecodeSamples = 48;  // weights are read once for so many; their activations stay in the L2 cache
// Decodes the samples [begin, end), up to kDecodeSamples at a time; a sample's result is the same whatever the range.
BIFLOW_CPU_KERNEL(decode_block, (const DecodeBlockParams& p, int64_t begin, int64_t end), (p, begin, end))
}  // namespace cpu
}  // namespace biflow
