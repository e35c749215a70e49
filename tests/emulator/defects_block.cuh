// Defects inside one block: barriers, shared memory, warps, asynchronous copies. See defects.cu.
#pragma once

#include "emulator/testing.h"

namespace biflow::test {

constexpr int kThreads = 64;

// What a kernel works on: input and output with one element per thread of two blocks, flags that are 0.
struct Arrays {
  float *in, *out;
  uint32_t* flags;
};

// --- one block: barriers and shared memory ------------------------------------------------------------------------

template <bool kCorrect>
__global__ void missing_syncthreads(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads]);
  const int t = threadIdx.x;
  s[t] = a.in[t];  // missing_syncthreads
  if (kCorrect) __syncthreads();
  const float v = s[kThreads - 1 - t];  // missing_syncthreads
  __syncthreads();
  s[t] = v;
  a.out[t] = s[t] + 1;
  a.out[t + kThreads] = v;
}

template <bool kCorrect>
__global__ void missing_syncthreads_after_reading(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads]);
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    s[t] = a.in[t + i * kThreads];  // missing_syncthreads_after_reading
    __syncthreads();
    a.out[t + i * kThreads] = s[t ^ 40];  // missing_syncthreads_after_reading
    if (kCorrect) __syncthreads();
  }
}

template <bool kCorrect>
__global__ void missing_syncwarp(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads]);
  const int t = threadIdx.x;
  s[t] = 0;
  __syncwarp();
  s[t] = a.in[t];  // missing_syncwarp
  if (kCorrect) __syncwarp();
  const float v = s[t ^ 1];  // missing_syncwarp
  a.out[t] = v;
}

template <bool kCorrect>
__global__ void two_writers(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads]);
  const int t = threadIdx.x;
  s[kCorrect ? t : t / 2] = a.in[t];  // two_writers
  a.out[t] = t % 2 || kCorrect ? s[kCorrect ? t : t / 2] : 0;
}

// Readers of several warps, then a writer that is in step with its own warp only.
template <bool kCorrect>
__global__ void many_readers(Arrays a) {
  BIFLOW_SHARED(float, s, [1]);
  const int t = threadIdx.x;
  if (t == 0) s[0] = a.in[0];
  __syncthreads();
  a.out[t] = s[0];  // many_readers
  if (kCorrect) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (t == 0) s[0] = 1;  // many_readers
}

// In the order of the threads, the writer is the last one that reads.
template <bool kCorrect>
__global__ void reader_writes(Arrays a) {
  BIFLOW_SHARED(float, s, [1]);
  const int t = threadIdx.x;
  if (t == 0) s[0] = a.in[0];
  __syncthreads();
  a.out[t] = s[0];  // reader_writes
  if (kCorrect) __syncthreads();
  if (t == kThreads - 1) s[0] = 1;  // reader_writes
}

template <bool kCorrect>
__global__ void uninitialised_shared(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads + 1]);
  const int t = threadIdx.x;
  s[t] = a.in[t];
  if (kCorrect && t == 0) s[kThreads] = 0;
  __syncthreads();
  a.out[blockIdx.x * kThreads + t] = s[t + 1];  // uninitialised_shared
}

template <bool kCorrect>
__global__ void shared_out_of_bounds(Arrays a) {
  BIFLOW_DYNAMIC_SHARED(bytes);
  float* s = reinterpret_cast<float*>(bytes);  // kThreads floats
  const int t = threadIdx.x;
  s[t] = a.in[t];
  __syncthreads();
  const int from = kCorrect ? (t + 1) % kThreads : t + 1;
  a.out[t] = s[from];  // shared_out_of_bounds
}

template <bool kCorrect>
__global__ void array_index(Arrays a) {
  BIFLOW_SHARED(float, s, [4][16]);
  const int t = threadIdx.x;
  const int column = t % 16 + (kCorrect ? 0 : t == 3 ? 14 : 0);
  s[t / 16][column] = a.in[t];  // array_index
  a.out[t] = s[t / 16][t % 16];
}

template <bool kCorrect>
__global__ void local_index(Arrays a) {
  float v[4];
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) v[i] = a.in[(t + i) % kThreads];
  const int i = kCorrect ? t % 4 : t % 5;
  a.out[t] = v[i];  // local_index
}

template <bool kCorrect>
__global__ void divergent_barrier(Arrays a) {
  const int t = threadIdx.x;
  if (!kCorrect && t < 32) {
    __syncthreads();
    a.out[t] = 0;
  } else {
    __syncthreads();  // divergent_barrier
    a.out[t] = 1;
  }
}

template <bool kCorrect>
__global__ void barrier_after_return(Arrays a) {
  const int t = threadIdx.x;
  if (!kCorrect && t == 5) return;
  __syncthreads();  // barrier_after_return
  a.out[t] = 1;
}

template <bool kCorrect>
__global__ void deadlock(Arrays a) {
  const int t = threadIdx.x;
  float v = a.in[t];
  if (kCorrect || t != 9) v = __shfl_sync(0xffffffffu, v, 0);  // deadlock
  __syncthreads();
  a.out[t] = v;
}

template <bool kCorrect>
__global__ void divergent_collective(Arrays a) {
  const int t = threadIdx.x;
  float v;
  if (kCorrect || t % 2) {
    v = __shfl_xor_sync(0xffffffffu, a.in[t], 1);  // divergent_collective
  } else {
    v = __shfl_xor_sync(0xffffffffu, a.in[t], 2);
  }
  a.out[t] = v;
}

template <bool kCorrect>
__global__ void lane_outside_mask(Arrays a) {
  const int t = threadIdx.x;
  a.out[t] = a.in[t];
  if (t < 16)
    a.out[t] = __shfl_down_sync(0xffffu, a.in[t], kCorrect ? 4 : 12, kCorrect ? 16 : 32);  // lane_outside_mask
}

template <bool kCorrect>
__global__ void lane_returned(Arrays a) {
  const int t = threadIdx.x;
  if (t == 40) return;
  const uint32_t mask = kCorrect && t >= 32 ? ~(1u << 8) : ~0u;
  a.out[t] = static_cast<float>(__ballot_sync(mask, 1));  // lane_returned
}

// --- asynchronous copies --------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void copy_not_waited(Arrays a) {
  BIFLOW_SHARED(float4, s, [kThreads / 4][2]);
  const int t = threadIdx.x;
  if (t >= kThreads / 4) return;
  for (int i = 0; i < 2; ++i) {
    arch::cp_async_16(&s[t][i], a.in + 4 * t + i * kThreads);
    arch::cp_async_commit();
  }
  arch::cp_async_wait<kCorrect ? 0 : 1>();
  a.out[t] = s[t][0].x;
  a.out[t + kThreads] = s[t][1].x;  // copy_not_waited
}

template <bool kCorrect>
__global__ void copy_without_barrier(Arrays a) {
  BIFLOW_SHARED(float4, s, [kThreads / 4]);
  const int t = threadIdx.x;
  if (t < kThreads / 4) arch::cp_async_16(&s[t], a.in + 4 * t);
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  if (kCorrect) __syncthreads();
  a.out[t] = reinterpret_cast<const float*>(s)[t];  // copy_without_barrier
}

template <bool kCorrect>
__global__ void copy_into_memory_in_use(Arrays a) {
  BIFLOW_SHARED(float4, s, [kThreads]);
  const int t = threadIdx.x;
  s[t] = float4{1, 2, 3, static_cast<float>(t)};
  __syncthreads();
  a.out[t] = s[t ^ 32].w;  // copy_into_memory_in_use
  if (kCorrect) __syncthreads();
  arch::cp_async_16(&s[t], a.in + 4 * (t % 16));  // copy_into_memory_in_use
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  a.out[t + kThreads] = s[t].x;
}

// The source is read some time between the copy's issue and the end of the wait.
template <bool kCorrect>
__global__ void copy_source_overwritten(Arrays a) {
  BIFLOW_SHARED(float4, s, [kThreads / 4]);
  const int t = threadIdx.x;
  if (t < 16) arch::cp_async_16(&s[t], a.in + 4 * t);  // copy_source_overwritten
  arch::cp_async_commit();
  if (kCorrect) arch::cp_async_wait<0>();
  __syncthreads();
  if (t >= 32) a.in[t - 32] = 2;  // copy_source_overwritten
  arch::cp_async_wait<0>();
  if (t < 16) a.out[t] = s[t].x;
}
template <bool kCorrect>
__global__ void copy_source_too_late(Arrays a) {
  BIFLOW_SHARED(float4, s, [kThreads / 4]);
  const int t = threadIdx.x;
  if (kCorrect && t >= 32) a.in[t - 32] = 2;
  if (kCorrect) __syncthreads();
  if (t < 16) arch::cp_async_16(&s[t], a.in + 4 * t);  // copy_source_too_late
  arch::cp_async_commit();
  if (!kCorrect && t >= 32) a.in[t - 32] = 2;  // copy_source_too_late
  __syncthreads();
  arch::cp_async_wait<0>();
  if (t < 16) a.out[t] = s[t].x;
}

}  // namespace biflow::test
