// What the kernels of decode_block share: the order of the phases, sizes, weights and buffers. Maths:
// biflow/ops/decode_block.py.
//
// A sequence is one sample under one condition; with guidance the B unconditional ones follow the B conditional ones. A
// step evaluates one token of every sequence: first the prefix tokens, then those whose output somebody needs. What a
// step does is divided into phases; between two phases all blocks of the grid see what all have written.
#pragma once

#include "arch/arch.cuh"
#include "arch/grid_barrier.cuh"
#include "decode_block.h"

namespace biflow::cuda {

constexpr int kDecodeWarps = 8, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kRowTile = 16;   // sequences that one tensor-core product takes
constexpr int kRing = 12;      // 16-byte pieces of weights under way for each thread
constexpr int kAtOnce = 8;     // of them, those that are used before others take their places
constexpr int kMaxHead = 256;  // channels of a head

//                              reads            writes
enum class DecodePhase : int {
  embed,      //                raw, z           token n of x; x = proj_in(token) + position + class, or a prefix token
  norm1,      //                x                y = norm1(x); left out with plan.norm_in_place
  qkv,        //                y, or x          qkv
  attention,  //                qkv, cache       cache of this step; o = attention(q) over the tokens so far
  proj,       //                o, x             x += proj(o)
  norm2,      //                x                y = norm2(x); left out with plan.norm_in_place
  fc1,        //                y, or x          h = gate(fc1)
  fc2,        //                h, x             x += fc2(h)
  head,       //                x                raw = proj_out(x)
};

struct DecodePlace {
  int step = 0, layer = 0;
  DecodePhase phase = DecodePhase::embed;
};

// A linear layer in fragments (csrc/block.h).
struct DecodeLinear {
  const uint4* weight;  // [tiles][blocks][lane]
  const float* bias;    // [8 tiles]
  int tiles, blocks;    // of 8 outputs; of 64 bytes of inputs
};

// All that a kernel gets. "act": of the precision. Strides in elements, multiples of 32; what is padded stays zero.
struct DecodeState {
  int64_t batch;
  int rows;    // sequences
  int prefix;  // tokens of the prefix that are evaluated
  int steps;   // evaluated tokens, with the prefix; the embed phase of step `steps` gives the last token
  int tokens, channels, width, layers, heads, head_dim, hidden;
  bool rmsnorm, swiglu, qk_norm, rope, pos_embed, start_token, shift_only;
  AffineOptions affine;
  BlockCondition condition;
  PackedBlock packed;
  DecodePlan plan;
  int row_groups;  // of 16 plan.row_tiles sequences
  int owners;      // blocks that share the columns of a row group's products

  const float* z;        // (B, T, D)
  float* out;            // (B, T, D)
  const float* weights;  // packed
  int x_stride, h_stride, qkv_stride, raw_stride;
  int head_stride;       // of a token of one head in the cache, a multiple of 8
  float* x;              // [rows][x_stride]
  float* qkv;            // [rows][qkv_stride]
  float* raw;            // [rows][raw_stride]
  void* y;               // act [rows][x_stride]; not with norm_in_place
  void* o;               // act [rows][x_stride]; with one split
  void* h;               // act [rows][h_stride]
  float *partial, *lse;  // [split][rows][x_stride], [split][rows][heads]; with several: log2 of their weights
  void* cache;           // act [layer][row][head][keys, values][prefix + tokens][head_stride]
  arch::GridBarrier* barrier;

  BIFLOW_HOST_DEVICE bool in_prefix(int step) const { return step < prefix; }
  // Tokens of the sequence proper that were evaluated before this step: its raw parameters make a token if not 0.
  BIFLOW_HOST_DEVICE int evaluated(int step) const { return step - prefix; }
  // The token that the embed phase of this step produces, in block order; none if it is negative.
  BIFLOW_HOST_DEVICE int produced(int step) const { return evaluated(step) - (start_token ? 1 : 0); }
  BIFLOW_HOST_DEVICE int data_index(int n) const { return affine.flip ? tokens - 1 - n : n; }

  // Whether a phase has anything to do at this place. Of a prefix token the last layer needs keys and values only.
  BIFLOW_HOST_DEVICE bool is_run(const DecodePlace& at) const {
    switch (at.phase) {
      case DecodePhase::embed:
      case DecodePhase::qkv:
      case DecodePhase::attention:
        return true;
      case DecodePhase::norm1:
        return !plan.norm_in_place;
      case DecodePhase::head:
        return !in_prefix(at.step);
      default:
        return (at.phase != DecodePhase::norm2 || !plan.norm_in_place) &&
               !(in_prefix(at.step) && at.layer == layers - 1);
    }
  }
  BIFLOW_HOST_DEVICE bool is_product(const DecodePlace& at) const {
    switch (at.phase) {
      case DecodePhase::embed:
        return !in_prefix(at.step) && at.step < steps;
      case DecodePhase::norm1:
      case DecodePhase::norm2:
      case DecodePhase::attention:
        return false;
      default:
        return is_run(at);
    }
  }
  BIFLOW_HOST_DEVICE bool is_last(const DecodePlace& at) const { return at.step == steps; }

  // The products of a step in order: proj_in, of every layer qkv, proj, fc1 and fc2, proj_out.
  BIFLOW_HOST_DEVICE int products() const { return 4 * layers + 2; }
  // The place is one of a product.
  BIFLOW_HOST_DEVICE int product_of(const DecodePlace& at) const {
    switch (at.phase) {
      case DecodePhase::embed:
        return 0;
      case DecodePhase::head:
        return 4 * layers + 1;
      case DecodePhase::qkv:
        return 4 * at.layer + 1;
      case DecodePhase::proj:
        return 4 * at.layer + 2;
      case DecodePhase::fc1:
        return 4 * at.layer + 3;
      default:
        return 4 * at.layer + 4;
    }
  }
  BIFLOW_HOST_DEVICE DecodePlace product_place(int product) const {
    if (product == 0) return {0, 0, DecodePhase::embed};
    if (product == 4 * layers + 1) return {0, 0, DecodePhase::head};
    const int which = (product - 1) % 4;
    return {0, (product - 1) / 4,
            which == 0   ? DecodePhase::qkv
            : which == 1 ? DecodePhase::proj
            : which == 2 ? DecodePhase::fc1
                         : DecodePhase::fc2};
  }
  // Whether a step has that product, as is_product says of places.
  BIFLOW_HOST_DEVICE bool has_product(int step, int product) const {
    return !in_prefix(step) || (product > 0 && product <= 4 * layers - 3);
  }

  // The next phase in order, one that is left out as well.
  BIFLOW_HOST_DEVICE void advance(DecodePlace& at) const {
    if (at.phase == DecodePhase::head) {
      ++at.step, at.layer = 0, at.phase = DecodePhase::embed;
    } else if (at.phase != DecodePhase::fc2) {
      at.phase = static_cast<DecodePhase>(static_cast<int>(at.phase) + 1);
    } else if (++at.layer < layers) {
      at.phase = DecodePhase::norm1;
    } else {
      at.phase = DecodePhase::head;
    }
  }
};

// Whether a block brings whole rows into shared memory before some products: those that it normalises, and those that
// attention has left in splits. row_tiles == 1.
BIFLOW_HOST_DEVICE bool stages_rows(const DecodePlan& plan) { return plan.norm_in_place || plan.splits > 1; }

// Where a block's dynamic shared memory goes, in bytes.
struct DecodeShared {
  size_t linears;  // the products of a step
  size_t ring;     // weights under way
  size_t sums;     // of a product, or what attention's warps exchange
  size_t rows;     // activations: whole rows, tokens, or what each warp multiplies next

  BIFLOW_HOST_DEVICE size_t all() const { return linears + ring + sums + rows; }
};

BIFLOW_HOST_DEVICE DecodeShared decode_shared(const DecodePlan& plan, bool bf16, int width, int layers, int channels) {
  const int tiles = bf16 ? (plan.row_tiles == 4 ? 8 : 4 * plan.row_tiles) : 4;  // of columns and rows
  const auto largest = [](size_t a, size_t b) { return a > b ? a : b; };
  const size_t ring = static_cast<size_t>(kRing) * kDecodeThreads * 16;
  const size_t sums = sizeof(float) * kDecodeWarps * tiles * kRowTile * kFragmentColumns;
  const size_t exchange = sizeof(float) * 2 * kDecodeWarps * (kMaxHead + 2);
  const size_t rows = static_cast<size_t>(kDecodeWarps) * 4 * kRowTile * kFragmentBytes;
  // with all that is padded: a norm writes that, too
  const size_t whole =
      stages_rows(plan) ? static_cast<size_t>(kRowTile) * round_up(width, kVectorPad) * (bf16 ? 2 : 4) : 0;
  const size_t tokens = sizeof(float) * kRowTile * plan.row_tiles * ((channels + 15) / 16 * 16);
  const size_t linears = sizeof(DecodeLinear) * (4 * static_cast<size_t>(layers) + 2);
  return {(linears + 15) / 16 * 16, ring, largest(sums, exchange), largest(largest(rows, whole), tokens)};
}

// Enqueues the phases, at most so many of them where they are launches of their own.
template <class Act>
cudaError_t launch_decode(const DecodeState& s, int64_t phases, cudaStream_t stream);

// proj_in and proj_out are fp32 always.
BIFLOW_DEVICE bool is_fp32_product(DecodePhase phase) {
  return phase == DecodePhase::embed || phase == DecodePhase::head;
}

// Inputs of a weight's fragment: `depth` of a block.
template <class Act>
BIFLOW_DEVICE int depth_of(DecodePhase phase) {
  return kFragmentBytes / (is_fp32_product(phase) ? 4 : static_cast<int>(sizeof(Act)));
}

template <class Act>
BIFLOW_DEVICE DecodeLinear linear_of(const DecodeState& s, const DecodePlace& at) {
  const PackedLayer& l = s.packed.layer;
  const PackedLinear& p = at.phase == DecodePhase::embed  ? s.packed.proj_in
                          : at.phase == DecodePhase::head ? s.packed.proj_out
                          : at.phase == DecodePhase::qkv  ? l.qkv
                          : at.phase == DecodePhase::proj ? l.proj
                          : at.phase == DecodePhase::fc1  ? l.fc1
                                                          : l.fc2;
  const float* base = s.weights;
  if (!is_fp32_product(at.phase)) base += s.packed.first_layer + at.layer * s.packed.layer_size;
  const int depth = depth_of<Act>(at.phase);
  return {reinterpret_cast<const uint4*>(base + p.weight), base + p.bias, p.columns / kFragmentColumns,
          (p.in + depth - 1) / depth};
}

BIFLOW_DEVICE const float* layer_vector(const DecodeState& s, int layer, int64_t at) {
  return s.weights + s.packed.first_layer + layer * s.packed.layer_size + at;
}

}  // namespace biflow::cuda
