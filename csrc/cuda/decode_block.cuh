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

// The phase `at`, or (all, in a cooperative launch) that one and all after it.
template <class Act, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_block_kernel(const DecodeState s, DecodePlace at, bool all) {
  BIFLOW_DYNAMIC_SHARED(shared);
  StepProducts<Act, kRowTiles> products(s, shared);
  products.weights().start(at, !all);
  for (uint32_t barriers = 0;; s.advance(at)) {
    if (!s.is_run(at)) continue;
    run_phase<Act>(s, products, at);
    if (!all || s.is_last(at)) return;
    arch::grid_barrier(s.barrier, ++barriers);
  }
}

template <class Act, int kRowTiles>
cudaError_t launch_decode_of(const DecodeState& s, int64_t phases, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(s.plan.blocks)), block(kDecodeThreads);
  const auto kernel = &decode_block_kernel<Act, kRowTiles>;
  const size_t bytes = decode_shared(s.plan, sizeof(Act) == 2, s.width, s.layers, s.channels).all();
  DecodePlace at;
  if (s.plan.persistent) return arch::launch_cooperative(kernel, grid, block, bytes, stream, s, at, true);
  for (; phases != 0; s.advance(at)) {
    if (!s.is_run(at)) continue;
    const auto status = arch::launch(kernel, grid, block, bytes, stream, s, at, false);
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
