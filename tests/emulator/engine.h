// What compiled kernels call: barriers, warp collectives, asynchronous copies, atomics, shared memory, launches.
// cuda.h and csrc/arch/emulated.cuh give these their CUDA names.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>

// Code of the emulator that is compiled together with kernels: the hooks must not see its accesses.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

namespace emulator {

// What a kernel did wrong.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A place in the source; as the default value of a parameter, the place of the call.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Location& other) const;
};

// What threadIdx and the like show; set at every switch between threads.
struct Context {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Context context;

// --- barriers and warp collectives ------------------------------------------------------------------------------
// All but __syncwarp-like `warp_barrier` exchange values only: they order no memory.

enum class Vote { all, any, count };
enum class Shuffle { index, up, down, exchange };
enum class Reduce { add, min, max };

void block_barrier(Location at);
int block_vote(Vote vote, bool predicate, Location at);
void grid_barrier(Location at);
void warp_barrier(uint32_t mask, Location at);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Location at);
uint32_t ballot(uint32_t mask, bool predicate, Location at);
int64_t reduce(Reduce kind, uint32_t mask, int64_t value, Location at);

// One m16n8k16 product of a warp; `half`: operands are fp16, otherwise bf16.
void mma_m16n8k16(bool half, float* d, const uint32_t* a, const uint32_t* b, const float* c, Location at);
// `count` (2 or 4) matrices into r[0 .. count).
void ldmatrix(int count, bool transposed, uint32_t* r, const void* row, Location at);

// Gives way to other threads, in a loop that waits for them.
void spin(Location at);

// --- memory -----------------------------------------------------------------------------------------------------

// An error unless p is a multiple of `bytes`.
void require_alignment(const void* p, size_t bytes);

// 16 bytes; read: false writes zeros.
void copy_async(void* to, const void* from, bool read, Location at);
void copy_commit();
void copy_wait(size_t pending);

enum class Atomic { load, store, update };
// Called before the access.
void atomic(const void* p, size_t bytes, Atomic kind, Location at);
void release_fence();
void acquire_fence();
// The memory is read through the non-coherent path: nobody may write it in this launch.
void read_only(const void* p, size_t bytes, Location at);

// Static shared memory of this block: the same for every call with one key.
void* shared_variable(const void* key, size_t bytes, size_t alignment, const char* name, Location at);
unsigned char* dynamic_shared(Location at);

// --- launches ---------------------------------------------------------------------------------------------------

constexpr int kMultiprocessors = 4;
constexpr size_t kSharedLimit = 227 * 1024;  // bytes a block may have, static and dynamic

struct Launch {
  const void* kernel;
  void (*run)(const void* call);  // runs the kernel as one thread
  const void* call;               // function and arguments
  size_t call_bytes;
  dim3 grid, block;
  size_t shared;
  bool cooperative;
};

// Runs all threads. A launch that CUDA would refuse returns CUDA's error; what the kernel does wrong is thrown.
cudaError_t launch(const Launch& launch);

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void run(const void* call) {
    const auto& self = *static_cast<const Call*>(call);
    std::apply([&](const P&... p) { self.kernel(p...); }, self.arguments);
  }
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, bool cooperative, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  const Call<P...> call{kernel, {std::forward<A>(arguments)...}};
  return launch(
      {reinterpret_cast<const void*>(kernel), &Call<P...>::run, &call, sizeof(call), grid, block, shared, cooperative});
}

}  // namespace emulator

// How threads of later launches run: order 0 forward, 1 reverse, 2 random (by `seed`, the same for every launch);
// copy_async: when cp.async copies land: 0 when waited for, 1 at once, 2 either.
extern "C" __attribute__((visibility("default"))) void emulator_configure(int order, uint64_t seed, int copy_async);
