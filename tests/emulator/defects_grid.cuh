// Defects in global memory and between blocks. See defects.cu.
#pragma once

#include "emulator/defects_block.cuh"

namespace biflow::test {

// --- global memory --------------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void read_out_of_bounds(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int from = kCorrect ? i : i + 1;
  a.out[i] = a.in[from];  // read_out_of_bounds
}

template <bool kCorrect>
__global__ void write_out_of_bounds(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float v = a.in[i];
  a.out[kCorrect ? i : i - 1] = v;  // write_out_of_bounds
}

template <bool kCorrect>
__global__ void memory_of_the_host(Arrays a) {
  static float everywhere[2 * kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float* to = kCorrect ? everywhere : a.out + (size_t{1} << 32);
  to[i] = a.in[i];  // memory_of_the_host
}

template <bool kCorrect>
__global__ void misaligned(Arrays a) {
  const int t = threadIdx.x;
  if (t > 8) return;
  const auto v = arch::Vector<float, 4>::load(a.in + (kCorrect ? 4 : 2) * t);  // misaligned
  a.out[t] = v.v[1] + v.v[3];
}

template <bool kCorrect>
__global__ void misaligned_store(Arrays a) {
  const int t = threadIdx.x;
  if (t > 8) return;
  const auto v = arch::Vector<float, 4>::load(a.in + 4 * t);
  v.store(a.out + (kCorrect ? 4 : 5) * t);  // misaligned_store
}

template <bool kCorrect>
__global__ void null_pointer(Arrays a) {
  const int t = threadIdx.x;
  const float* const from = kCorrect || t != 3 ? a.in + t : nullptr;
  a.out[t] = *from;  // null_pointer
}

template <bool kCorrect>
__global__ void undefined_shift(Arrays a) {
  const int t = threadIdx.x;
  a.out[t] = static_cast<float>(1u << (kCorrect ? t % 32 : t));  // undefined_shift
}

template <bool kCorrect>
__global__ void signed_overflow(Arrays a) {
  const int t = threadIdx.x;
  a.out[t] = static_cast<float>(kCorrect ? t : t * 0x4000000);  // signed_overflow
}

template <bool kCorrect>
__global__ void division_by_zero(Arrays a) {
  const int t = threadIdx.x;
  a.out[t] = static_cast<float>(100 / (kCorrect ? t + 1 : t % 7));  // division_by_zero
}

template <bool kCorrect>
__global__ void uninitialised_global(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kCorrect) a.out[i] = 1;
  a.out[i] = a.in[i] + a.out[i];  // uninitialised_global
}

template <bool kCorrect>
__global__ void unwritten_output(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kCorrect || i != 70) a.out[i] = a.in[i];
}

template <bool kCorrect>
__global__ void ldg_of_written(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  a.out[i] = a.in[i];
  a.out[i] = 2 * (kCorrect ? __ldcg(a.out + i) : __ldg(a.out + i));  // ldg_of_written
}

// --- between blocks -------------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void missing_grid_sync(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  a.out[i] = a.in[i];  // missing_grid_sync
  if (kCorrect) arch::grid_sync();
  const float v = a.out[(i + kThreads) % (2 * kThreads)];  // missing_grid_sync
  arch::grid_sync();
  a.out[i] = v;
}

template <bool kCorrect>
__global__ void missing_grid_sync_after_reading(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  a.out[i] = a.in[(i + kThreads) % (2 * kThreads)];  // missing_grid_sync_after_reading
  if (kCorrect) arch::grid_sync();
  a.in[i] = 1;  // missing_grid_sync_after_reading
}

template <bool kCorrect>
__global__ void missing_second_grid_sync(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 1) a.out[t] = a.in[t];
  arch::grid_sync();
  if (blockIdx.x == 0) a.out[t] = 1;  // missing_second_grid_sync
  if (kCorrect) arch::grid_sync();
  if (blockIdx.x == 1) a.out[t + kThreads] = a.out[t];  // missing_second_grid_sync
}

template <bool kCorrect>
__global__ void other_block_reads(Arrays a) {
  const int t = threadIdx.x;
  a.out[blockIdx.x * kThreads + t] = a.in[t];  // other_block_reads
  if (kCorrect) arch::grid_sync();
  if (blockIdx.x == 1) a.in[t] = 2;  // other_block_reads
}

template <bool kCorrect>
__global__ void grid_sync_not_cooperative(Arrays a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (!kCorrect) arch::grid_sync();  // grid_sync_not_cooperative
  a.out[i] = a.in[i];
}

// Block 0 sends its half of `in` to block 1. What is left out: 1 the release, 2 the acquire, 3 the barrier after the
// acquire, 4 raising the flag, 5 the barrier before the release.
template <int kMissing>
__device__ void send(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    a.out[t] = a.in[t];
    if (kMissing != 5) __syncthreads();
    if (t == 0) {
      if (kMissing != 1) arch::release_fence();
      if (kMissing != 4) arch::store_relaxed(a.flags, 1);
    }
  } else {
    if (t == 0) {
      while (arch::load_relaxed(a.flags) == 0) arch::spin();  // livelock
      if (kMissing != 2) arch::acquire_fence();
    }
    if (kMissing != 3) __syncthreads();
    // the next line: missing_release, missing_acquire, missing_barrier_after_acquire, missing_barrier_before_release
    const float v = a.out[t];
    a.out[t + kThreads] = v;
  }
}
template <bool kCorrect>
__global__ void missing_release(Arrays a) {
  send<kCorrect ? 0 : 1>(a);
}
template <bool kCorrect>
__global__ void missing_acquire(Arrays a) {
  send<kCorrect ? 0 : 2>(a);
}
template <bool kCorrect>
__global__ void missing_barrier_after_acquire(Arrays a) {
  send<kCorrect ? 0 : 3>(a);
}
template <bool kCorrect>
__global__ void livelock(Arrays a) {
  send<kCorrect ? 0 : 4>(a);
}
template <bool kCorrect>
__global__ void missing_barrier_before_release(Arrays a) {
  send<kCorrect ? 0 : 5>(a);
}

// Every thread publishes its own element, without a barrier: the flag counts them all.
template <bool kCorrect>
__global__ void release_by_each_thread(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    a.out[t] = a.in[t];
    if (kCorrect || t != 7) arch::release_fence();
    arch::add_relaxed(a.flags, 1);
  } else {
    while (arch::load_relaxed(a.flags) != kThreads) arch::spin();
    arch::acquire_fence();
    a.out[t + kThreads] = a.out[t ^ 7];  // release_by_each_thread
  }
}

// A relaxed store to a flag ends what its release had published; an update goes on with it.
template <bool kCorrect>
__global__ void store_after_release(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    a.out[t] = a.in[t];
    __syncthreads();
    if (t != 0) return;
    arch::release_fence();
    arch::store_relaxed(a.flags, 1);
  } else if (blockIdx.x == 1) {
    if (t != 0) return;
    while (arch::load_relaxed(a.flags) != 1) arch::spin();
    if (kCorrect) {
      arch::add_relaxed(a.flags, 1);
    } else {
      arch::store_relaxed(a.flags, 2);
    }
    arch::store_relaxed(a.flags + 1, 1);
  } else {
    if (t == 0) {
      while (arch::load_relaxed(a.flags + 1) != 1) arch::spin();
      arch::load_relaxed(a.flags);  // 2, for the first time
      arch::acquire_fence();
    }
    __syncthreads();
    a.out[t + kThreads] = a.out[t];  // store_after_release
  }
}

// Block 0 has a fence, but block 2 raises the flag, without having heard of block 0.
template <bool kCorrect>
__global__ void load_after_release(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    a.out[t] = a.in[t];  // load_after_release
    __syncthreads();
    if (t != 0) return;
    arch::release_fence();
    if (kCorrect) {
      arch::store_relaxed(a.flags + 1, 1);
    } else {
      arch::load_relaxed(a.flags);
    }
  } else if (blockIdx.x == 1) {
    if (t == 0) {
      while (arch::load_relaxed(a.flags) != 1) arch::spin();
      arch::acquire_fence();
    }
    __syncthreads();
    a.out[t + kThreads] = a.out[t];  // load_after_release
  } else if (t == 0) {
    if (kCorrect) {
      while (arch::load_relaxed(a.flags + 1) != 1) arch::spin();
      arch::acquire_fence();
      arch::release_fence();
    }
    arch::add_relaxed(a.flags, 1);
  }
}

// One lane acquires for its warp.
template <bool kCorrect>
__global__ void missing_syncwarp_after_acquire(Arrays a) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    if (t >= 32) return;
    a.out[t] = a.in[t];
    __syncwarp();
    if (t != 0) return;
    arch::release_fence();
    arch::store_relaxed(a.flags, 1);
  } else if (t < 32) {
    if (t == 0) {
      while (arch::load_relaxed(a.flags) != 1) arch::spin();
      arch::acquire_fence();
    }
    if (kCorrect) __syncwarp();
    a.out[t + kThreads] = a.out[t];  // missing_syncwarp_after_acquire
  }
}

template <bool kCorrect>
__global__ void atomic_and_plain(Arrays a) {
  const int t = threadIdx.x;
  atomicAdd(a.flags, 1u);  // atomic_and_plain
  if (kCorrect) __syncthreads();
  const uint32_t count = *a.flags;  // atomic_and_plain
  a.out[t] = static_cast<float>(count);
}

}  // namespace biflow::test
