// One flow block, a causal transformer over T tokens: its shape, its packed weights, what it is conditioned on.
// Maths: biflow/ops/decode_block.py. Shapes: B samples, T tokens, D channels, C width, d head_dim, H = C / d heads,
// F mlp_hidden, L layers, S prefix tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace biflow {

enum class Norm : int { layernorm, rmsnorm };  // eps 1e-5, weight and bias | eps 1e-6, weight
enum class Gate : int { gelu, swiglu };        // gelu(fc1 x) | silu(first half of fc1 x) * second half
// of the layers' weights, of the activations they are multiplied with and of cached keys and values; all sums are fp32
enum class Precision : int { fp32, bf16 };

// Which kernels read the packed weights.
enum class Target : int { cpu, cuda };

// What decides the packed layout, for each target.
struct BlockShape {
  int tokens = 0, channels = 0, width = 0, layers = 0, head_dim = 0, mlp_hidden = 0;
  Norm norm = Norm::layernorm;
  Gate gate = Gate::gelu;
  bool qk_norm = false, rope = false, pos_embed = true, start_token = false, shift_only = false;
  Precision precision = Precision::fp32;

  int heads() const { return width / head_dim; }
  int fc1_rows() const { return gate == Gate::swiglu ? 2 * mlp_hidden : mlp_hidden; }
  int raw_columns() const { return shift_only ? channels : 2 * channels; }
  // On a CPU: whether heads and hidden units divide into two halves of whole tiles, so that two threads can share a
  // layer in two phases (csrc/cpu/transformer.h).
  bool has_halves() const { return heads() % 2 == 0 && head_dim % 32 == 0 && mlp_hidden % 64 == 0; }
};

// ---- Packed weights: one array of 32-bit words that a step reads front to back. The order is that of the fields of
// PackedBlock, the layers one after the other in the order of PackedLayer; a linear layer is its weight, then its bias
// [columns]. proj_in and proj_out, which touch the data, are fp32 always. What is padded is padded with zeros.
//
// For a CPU every piece starts on a 64-byte boundary; vectors are padded to a multiple of kColumnGroup. A linear layer
// (out, in) is stored by columns of its transpose, padded to a multiple of kColumnGroup (kTileColumns with bf16). fp32:
// panels of kPanelColumns outputs (the last one may be narrower), each [in][columns of the panel]. bf16: tiles of
// kColumnGroup outputs, each [in / 2][kColumnGroup] pairs (k even in the low half), `in` padded to a multiple of
// kTileDepth: what AMX multiplies. The columns of fc1 with swiglu alternate: kColumnGroup of the first half,
// kColumnGroup of the second.
//
// For CUDA every piece starts on a 128-byte boundary; vectors are padded to a multiple of kVectorPad. A linear layer is
// stored in fragments of kFragmentColumns outputs and kFragmentBytes of each: [columns / 8][in / depth][lane][16
// bytes], where lane 4 g + t of a warp holds output g, inputs 8 t to 8 t + 7 of 32 (bf16) or 4 t to 4 t + 3 of 16
// (fp32). The columns of fc1 with swiglu alternate one by one.
constexpr int kPanelColumns = 64;
constexpr int kColumnGroup = 16;
constexpr int kTileColumns = 32, kTileDepth = 32;
constexpr int kVectorPad = 32;
constexpr int kFragmentColumns = 8, kFragmentBytes = 64, kFragmentWords = kFragmentColumns * kFragmentBytes / 4;

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static constexpr int64_t padded_columns(int64_t n) { return round_up(n, kColumnGroup); }

struct PackedLinear {
  int64_t weight = 0, bias = 0;  // offsets in words; inside a layer, from the layer's start
  int in = 0, columns = 0;       // columns as stored

  // On a CPU the products with proj and fc2 are added to the residual stream in two parts, those of the inputs before
  // this one and those of the others, whoever computes them: two threads can do so without waiting for one another.
  int second_half() const { return in < 2 * kTileDepth ? in : in / 2 / kTileDepth * kTileDepth; }
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
  int64_t size = 0;                    // of it all, in words
};

PackedBlock packed_block(const BlockShape& s, Target target = Target::cpu);

// How one tensor of the state_dict, (rows, columns), is stored: row by row, `stride` words apart, or as the weight of a
// linear layer.
struct PackedSource {
  enum class Form : int { rows, panels, tiles, fragments, fragments_bf16 };
  int64_t at = 0;  // in words
  int64_t rows = 0, columns = 0, stride = 0;
  Form form = Form::rows;
  int64_t half = 0;  // a linear layer's rows, or a bias' columns, from here on alternate with those before; 0: none do
};

// Of all tensors in the order below.
std::vector<PackedSource> packed_sources(const BlockShape& s, Target target = Target::cpu);

// source: the state_dict's tensors, contiguous, in the order proj_in.weight, .bias, [pos_embed], [start_token],
// [rope_cos, rope_sin], then per layer norm1.weight, [norm1.bias], qkv.weight, .bias, [q_norm.weight, k_norm.weight],
// proj.weight, .bias, norm2.weight, [norm2.bias], fc1.weight, .bias, fc2.weight, .bias, and last proj_out.weight, .bias
// ([] where configured); packed: packed_block(s).size words, 64-byte aligned. For a CPU.
void pack_block(const BlockShape& s, const float* const* source, float* packed);

// ---- The cache of one sequence and head, in words. Keys in blocks of kKeyBlock tokens, each [d][kKeyBlock], so that a
// vector holds one channel of neighbouring tokens and a block is read front to back; then values [token][d padded].
// With bf16 a word holds a pair: of keys channels 2i (low half) and 2i + 1, of values tokens 2t (low) and 2t + 1.
// Prefix tokens come before the sequence's own. The cache of a sequence is [layer][head].
constexpr int kKeyBlock = 16;

struct CacheShape {
  int d = 0, d_padded = 0, tokens = 0;
  bool pairs = false;

  CacheShape(const BlockShape& s, int prefix_tokens)
      : d(s.head_dim),
        d_padded(static_cast<int>(padded_columns(s.head_dim))),
        tokens(prefix_tokens + s.tokens),
        pairs(s.precision == Precision::bf16) {}

  int key_words() const { return pairs ? d / 2 : d; }  // of a token
  int64_t padded_tokens() const { return round_up(tokens, pairs ? kTileDepth : kKeyBlock); }
  int64_t keys_size() const { return padded_tokens() * key_words(); }
  int64_t size() const { return keys_size() + (pairs ? padded_tokens() / 2 : tokens) * d_padded; }
};

// ---- What a pass is conditioned on, and the second pass of guidance.
struct BlockCondition {
  int prefix_tokens = 0;               // S
  const float* added = nullptr;        // (B, C) or null: added to every token
  const float* prefix = nullptr;       // (B, S, C) or null: tokens before the first, without position
  bool guided = false;                 // a second, unconditional pass beside the first:
  const float* null_added = nullptr;   // (B, C) or null
  const float* null_prefix = nullptr;  // (B, S, C), null iff prefix is
  float guidance = 0;                  // g: raw += g (raw - raw of the unconditional pass)
  bool guide_a = true, guide_b = true,
       anneal = true;   // of the raw scale, of the raw shift; g n / max(T - 1, 1) for token n
  float attn_temp = 1;  // divides the attention logits of the unconditional pass
};

}  // namespace biflow
