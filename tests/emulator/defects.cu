// One kernel per kind of defect, and its correct twin. tests/kernels/test_emulator.py asserts that the checker names
// the line that ends in "// NAME", and that it has nothing to say about the twin.
//
//   defects NAME defect|correct [forward|reverse|random]   prints what the emulator says, or "no error"
#include <cstring>
#include <map>

#include "emulator/memory.h"
#include "emulator/testing.h"

namespace {

using namespace biflow::test;
namespace arch = biflow::arch;

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

template <bool kCorrect>
__global__ void uninitialised_shared(Arrays a) {
  BIFLOW_SHARED(float, s, [kThreads + 1]);
  const int t = threadIdx.x;
  s[t] = a.in[t];
  if (kCorrect && t == 0) s[kThreads] = 0;
  __syncthreads();
  a.out[t] = s[t + 1];  // uninitialised_shared
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

template <bool kCorrect>
__global__ void atomic_and_plain(Arrays a) {
  const int t = threadIdx.x;
  atomicAdd(a.flags, 1u);  // atomic_and_plain
  if (kCorrect) __syncthreads();
  const uint32_t count = *a.flags;  // atomic_and_plain
  a.out[t] = static_cast<float>(count);
}

// --- one launch -----------------------------------------------------------------------------------------------------

struct Case {
  void (*defect)(Arrays);
  void (*correct)(Arrays);
  uint32_t blocks;
  bool cooperative;
  bool writes_all = false;  // of the output
};

#define CASE(name, ...)                             \
  {                                                 \
    #name, { name<false>, name<true>, __VA_ARGS__ } \
  }
const std::map<std::string, Case> kCases = {
    CASE(missing_syncthreads, 1, false),
    CASE(missing_syncthreads_after_reading, 1, false),
    CASE(missing_syncwarp, 1, false),
    CASE(two_writers, 1, false),
    CASE(many_readers, 1, false),
    CASE(uninitialised_shared, 1, false),
    CASE(shared_out_of_bounds, 1, false),
    CASE(array_index, 1, false),
    CASE(local_index, 1, false),
    CASE(divergent_barrier, 1, false),
    CASE(barrier_after_return, 1, false),
    CASE(deadlock, 1, false),
    CASE(divergent_collective, 1, false),
    CASE(lane_outside_mask, 1, false),
    CASE(lane_returned, 1, false),
    CASE(copy_not_waited, 1, false),
    CASE(copy_without_barrier, 1, false),
    CASE(copy_into_memory_in_use, 1, false),
    CASE(read_out_of_bounds, 2, false),
    CASE(write_out_of_bounds, 2, false),
    CASE(memory_of_the_host, 2, false),
    CASE(misaligned, 1, false),
    CASE(null_pointer, 1, false),
    CASE(undefined_shift, 1, false),
    CASE(signed_overflow, 1, false),
    CASE(division_by_zero, 1, false),
    CASE(uninitialised_global, 2, false),
    CASE(unwritten_output, 2, false, true),
    CASE(ldg_of_written, 2, false),
    CASE(missing_grid_sync, 2, true),
    CASE(missing_grid_sync_after_reading, 2, true),
    CASE(grid_sync_not_cooperative, 2, false),
    CASE(missing_release, 2, true),
    CASE(missing_acquire, 2, true),
    CASE(missing_barrier_after_acquire, 2, true),
    CASE(missing_barrier_before_release, 2, true),
    CASE(livelock, 2, true),
    CASE(release_by_each_thread, 2, true),
    CASE(atomic_and_plain, 1, false),
};

void run(const Case& c, bool correct) {
  Device<float> in(std::vector<float>(2 * kThreads, 1)), out(2 * kThreads);
  Device<uint32_t> flags(std::vector<uint32_t>(1, 0));
  // what is declared twice keeps its first state: an op that works in place declares its input as its output too
  emulator::adopt(in.get() + 5, 20 * sizeof(float), false);
  emulator::adopt(out.get() + 5, 20 * sizeof(float), true);
  const Arrays arrays{in.get(), out.get(), flags.get()};
  const auto kernel = correct ? c.correct : c.defect;
  const size_t shared = kThreads * sizeof(float);
  if (c.cooperative) {
    require(arch::launch_cooperative(kernel, dim3(c.blocks), dim3(kThreads), shared, nullptr, arrays));
  } else {
    require(arch::launch(kernel, dim3(c.blocks), dim3(kThreads), shared, nullptr, arrays));
  }
  if (c.writes_all) emulator::check_written();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  if (argc > 3) emulator_configure(argv[3][0] == 'f' ? 0 : std::strcmp(argv[3], "reverse") == 0 ? 1 : 2, 3, 0);
  try {
    run(kCases.at(argv[1]), std::strcmp(argv[2], "correct") == 0);
    std::puts("no error");
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
  return 0;
}
