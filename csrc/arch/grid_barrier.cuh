// A barrier for all blocks of a cooperative launch, cheaper than grid_sync: arrivals are spread over counters in cache
// lines of their own, fences are acquire and release, not sequentially consistent.
#pragma once

#include "arch/arch.cuh"

namespace biflow::arch {

// In device memory, zeroed before each launch. Counters only grow and may wrap.
struct GridBarrier {
  static constexpr uint32_t kShards = 8, kLine = 32;  // a line is 32 words, 128 bytes
  uint32_t arrived[kShards * kLine];                  // word s * kLine: how often blocks s, s + kShards, ... arrived
};

// Waits until every thread of the grid is here; what it wrote before is visible to all behind. All threads of all
// blocks call it with number = 1, 2, 3, ... (blocks have at least kShards threads, the grid is one-dimensional). Every
// block watches all counters: one hop through L2. One flag that a block raises for the others is two, and slower
// (docs/results.md).
BIFLOW_DEVICE void grid_barrier(GridBarrier* barrier, uint32_t number) {
  constexpr uint32_t kShards = GridBarrier::kShards, kLine = GridBarrier::kLine;
  const auto behind = [](uint32_t have, uint32_t wanted) { return static_cast<int32_t>(have - wanted) < 0; };
  uint32_t turn = 0;
  __syncthreads();  // the writes of this block come before the fence
  if (threadIdx.x == 0) {
    release_fence();
    add_relaxed(&barrier->arrived[blockIdx.x % kShards * kLine], 1);
  }
  if (threadIdx.x < kShards) {
    const uint32_t members = (gridDim.x + kShards - 1 - threadIdx.x) / kShards;
    while (behind(load_relaxed(&barrier->arrived[threadIdx.x * kLine]), number * members)) spin(++turn);
    acquire_fence();
  }
  __syncthreads();  // the block goes on when its watching threads have seen the others
}

}  // namespace biflow::arch
