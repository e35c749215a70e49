// A barrier for all blocks of a cooperative launch, cheaper than grid_sync: arrivals are spread over counters in cache
// lines of their own, fences are acquire and release, not sequentially consistent.
#pragma once

#include "arch/arch.cuh"

namespace biflow::arch {

// In device memory, zeroed before each launch. Counters only grow and may wrap.
struct GridBarrier {
  static constexpr uint32_t kShards = 8, kLine = 32;  // a line is 32 words, 128 bytes
  uint32_t arrived[kShards * kLine];                  // word s * kLine: how often blocks s, s + kShards, ... arrived
  uint32_t released[kLine];                           // word 0: the last barrier that is complete
};

// Waits until every thread of the grid is here; what it wrote before is visible to all behind. All threads of all
// blocks call it with number = 1, 2, 3, ... (blocks have at least kShards threads, the grid is one-dimensional).
// kFlag: block 0 watches the counters and then raises one flag, which the others watch: little traffic, two hops
// through L2. Otherwise every block watches all counters: one hop, kShards loads a round.
template <bool kFlag>
BIFLOW_DEVICE void grid_barrier(GridBarrier* barrier, uint32_t number) {
  constexpr uint32_t kShards = GridBarrier::kShards, kLine = GridBarrier::kLine;
  const auto behind = [](uint32_t have, uint32_t wanted) { return static_cast<int32_t>(have - wanted) < 0; };
  uint32_t turn = 0;
  __syncthreads();  // the writes of this block come before the fence
  if (threadIdx.x == 0) {
    release_fence();
    add_relaxed(&barrier->arrived[blockIdx.x % kShards * kLine], 1);
  }
  if (!kFlag || blockIdx.x == 0) {
    if (threadIdx.x < kShards) {
      const uint32_t members = (gridDim.x + kShards - 1 - threadIdx.x) / kShards;
      while (behind(load_relaxed(&barrier->arrived[threadIdx.x * kLine]), number * members)) spin(++turn);
      acquire_fence();
    }
    if (kFlag) {
      __syncthreads();  // all counters are seen before the flag goes up
      if (threadIdx.x == 0) {
        release_fence();
        store_relaxed(barrier->released, number);
      }
    }
  } else if (threadIdx.x == 0) {
    while (behind(load_relaxed(barrier->released), number)) spin(++turn);
    acquire_fence();
  }
  __syncthreads();  // the block goes on when its watching threads have seen the others
}

}  // namespace biflow::arch
