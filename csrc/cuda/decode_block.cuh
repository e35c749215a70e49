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

template <class Act, int kRowTiles>
cudaError_t launch_decode_of(const DecodeState& s, int64_t phases, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(s.plan.blocks)), block(kDecodeThreads);
  const size_t bytes = decode_shared(s.plan, sizeof(Act) == 2, s.width).all();
  if (s.plan.persistent)
    return arch::launch_cooperative(&decode_block_persistent<Act, kRowTiles>, grid, block, bytes, stream, s);
  for (DecodePlace at; phases != 0; s.advance(at)) {
    if (!s.is_run(at)) continue;
    const auto status = arch::launch(&decode_block_phase<Act, kRowTiles>, grid, block, bytes, stream, s, at);
    if (status != cudaSuccess || s.is_last(at)) return status;
    --phases;
  }
  return cudaSuccess;
}

template <class Act>
cudaError_t launch_decode(const DecodeState& s, int64_t phases, cudaStream_t stream) {
  if (s.plan.row_tiles == 4) return launch_decode_of<Act, 4>(s, phases, stream);
  if (s.plan.row_tiles == 2) return launch_decode_of<Act, 2>(s, phases, stream);
  return launch_decode_of<Act, 1>(s, phases, stream);
}

}  // namespace biflow::cuda
