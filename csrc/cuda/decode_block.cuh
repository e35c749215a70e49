// The exact sequential inverse of one flow block: the phases of a step (decode_block_state.cuh), which run either in
// one cooperative launch of all steps, with a grid barrier between two phases, or as a launch each.
#pragma once

#include "arch/grid_barrier.cuh"
#include "cuda/decode_block_attention.cuh"
#include "cuda/decode_block_norm.cuh"
#include "cuda/decode_block_product.cuh"
#include "cuda/decode_block_state.cuh"
#include "cuda/decode_block_tokens.cuh"

namespace biflow::cuda {

template <class Act, class Products>
BIFLOW_DEVICE void run_phase(const DecodeState& s, Products& products, const DecodePlace& at) {
  if (s.is_product(at)) return products.run(at);
  switch (at.phase) {
    case DecodePhase::embed:
      return s.is_last(at) ? StepTokens(s).produce_last() : StepTokens(s).copy_prefix(at.step);
    case DecodePhase::attention:
      return StepAttention<Act>(s, products.sums()).run(at.step, at.layer);
    default:
      return normalize<Act>(s, at);
  }
}

constexpr int kPersistentRing = 16, kPhaseRing = 8;  // pieces of weights under way for each thread

template <class Act, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode_block_persistent(const DecodeState s) {
  BIFLOW_DYNAMIC_SHARED(shared);
  StepProducts<Act, kRowTiles, kPersistentRing> products(s, shared);
  DecodePlace at;
  uint32_t barriers = 0;
  products.weights().start(at, false);
  for (; !s.is_last(at); s.advance(at)) {
    if (!s.is_run(at)) continue;
    run_phase<Act>(s, products, at);
    arch::grid_barrier<true>(s.barrier, ++barriers);
  }
  run_phase<Act>(s, products, at);
}

template <class Act, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads) decode_block_phase(const DecodeState s, const DecodePlace at) {
  BIFLOW_DYNAMIC_SHARED(shared);
  StepProducts<Act, kRowTiles, kPhaseRing> products(s, shared);
  products.weights().start(at, true);
  run_phase<Act>(s, products, at);
}

}  // namespace biflow::cuda
