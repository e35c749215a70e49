// Every wrapper of csrc/arch and every CUDA function that the emulator provides, against plain arithmetic on the host.
// The same program runs on the emulator and, compiled by nvcc, on a GPU: what passes on both means the same on both.
//
//   nvcc -std=c++17 -arch=native -I csrc -I tests -o conformance tests/emulator/conformance*.cu
//   conformance [forward|reverse|random SEED lazy|eager|random]   (the arguments are the emulator's)
#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>

#include "emulator/testing.h"

namespace {

using namespace biflow::test;
namespace arch = biflow::arch;

constexpr uint32_t kAll = 0xffffffffu;

// --- places and barriers ----------------------------------------------------------------------------------------

__global__ void places_kernel(int* out) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

void test_places() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  Device<int> out(12 * 60);
  require(arch::launch(places_kernel, grid, block, 0, nullptr, out.get()));
  bool passed = true;
  const auto values = out.values();
  for (int i = 0; i < 12 * 60; ++i) passed &= values[i] == i / 60 * 1000 + i % 60;
  expect("threadIdx, blockIdx, blockDim, gridDim", passed);
}

// Each of `rounds` barriers hands values to the mirrored thread; the votes count.
__global__ void barrier_kernel(const int* in, int* out, int* votes, int rounds) {
  BIFLOW_SHARED(int, values, [96]);
  const int t = threadIdx.x;
  int v = in[t];
  for (int i = 0; i < rounds; ++i) {
    values[t] = v + i;
    __syncthreads();
    v = values[95 - t] * 3;
    __syncthreads();
  }
  out[t] = v;
  const int odd = in[t] & 1;
  const int any = __syncthreads_or(odd), all = __syncthreads_and(odd), count = __syncthreads_count(odd);
  const int all_true = __syncthreads_and(1), none = __syncthreads_or(0);
  votes[t] = any + 2 * all + 4 * all_true + 8 * none + 16 * count;
}

void test_barriers() {
  auto in = random_bits<int>(96);
  for (int& v : in) v &= 0xff;
  in[0] = 1, in[1] = 0;
  Device<int> source(in), out(96), votes(96);
  require(arch::launch(barrier_kernel, dim3(1), dim3(96), 0, nullptr, source.read(), out.get(), votes.get(), 3));
  auto v = in;
  for (int i = 0; i < 3; ++i) {
    auto next = v;
    for (int t = 0; t < 96; ++t) next[t] = (v[95 - t] + i) * 3;
    v = next;
  }
  expect("__syncthreads", out.values() == v);
  int odd = 0;
  for (const int x : in) odd += x & 1;
  expect("__syncthreads_or, _and, _count", votes.values() == std::vector<int>(96, 1 + 4 + 16 * odd));
}

__global__ void shared_kernel(const uint32_t* in, uint32_t* out) {
  BIFLOW_DYNAMIC_SHARED(bytes);
  BIFLOW_SHARED(uint32_t, total);  // a scalar: total is one uint32_t
  auto words = reinterpret_cast<uint32_t*>(bytes);
  const int n = 15000;
  for (int i = threadIdx.x; i < n; i += blockDim.x) words[i] = in[i] + blockIdx.x;
  if (threadIdx.x == 0) total = blockIdx.x;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[blockIdx.x * n + i] = words[n - 1 - i] ^ total;
}

void test_shared() {
  const auto in = random_bits<uint32_t>(15000);
  Device<uint32_t> source(in), out(30000);
  require(arch::launch(shared_kernel, dim3(2), dim3(128), 60000, nullptr, source.read(), out.get()));
  const auto values = out.values();
  bool passed = true;
  for (uint32_t i = 0; i < 30000; ++i) passed &= values[i] == ((in[14999 - i % 15000] + i / 15000) ^ (i / 15000));
  expect("BIFLOW_SHARED, BIFLOW_DYNAMIC_SHARED (60000 bytes)", passed);
}

void test_refused_launches() {
  Device<int> out(1);
  int* const p = out.get();
  const auto clear = [](cudaError_t status) { return cudaGetLastError(), status; };
  expect("a block of 2048 threads is refused",
         clear(arch::launch(places_kernel, dim3(1), dim3(2048), 0, nullptr, p)) != cudaSuccess);
  expect("1 MB of shared memory is refused",
         clear(arch::launch(places_kernel, dim3(1), dim3(32), 1 << 20, nullptr, p)) == cudaErrorInvalidValue);
  const dim3 too_many(64 * arch::multiprocessors() + 1);
  expect("a cooperative grid that does not fit is refused",
         clear(arch::launch_cooperative(places_kernel, too_many, dim3(32), 0, nullptr, p)) ==
             cudaErrorCooperativeLaunchTooLarge);
  expect("takes_cooperative_launches", arch::takes_cooperative_launches());
  expect("taken gives the status back",
         arch::taken(cudaErrorInvalidValue) == cudaErrorInvalidValue && arch::taken(cudaSuccess) == cudaSuccess);
  expect("shared_memory_limit", arch::shared_memory_limit() >= 96 * 1024 && arch::shared_memory_limit() < 1 << 20);
}

// --- shuffles, votes, reductions ----------------------------------------------------------------------------------

enum class Form { index, up, down, exchange };

template <class T>
__device__ T shuffle(Form form, uint32_t mask, T v, int argument, int width) {
  if (form == Form::index) return __shfl_sync(mask, v, argument, width);
  if (form == Form::up) return __shfl_up_sync(mask, v, argument, width);
  if (form == Form::down) return __shfl_down_sync(mask, v, argument, width);
  return __shfl_xor_sync(mask, v, argument, width);
}

// The upper and the lower half of the warp go separate ways if the mask is not full.
template <class T>
__global__ void shuffle_kernel(const T* in, T* out, Form form, uint32_t mask, int argument, int width) {
  const uint32_t lane = threadIdx.x;
  if (mask >> lane & 1) {
    out[lane] = shuffle(form, mask, in[lane], argument, width);
  } else {
    out[lane] = shuffle(form, ~mask, in[lane], argument, width);
  }
}

template <class T>
bool shuffles_agree(Form form, uint32_t mask, int argument, int width) {
  const auto in = random_bits<T>(32);
  Device<T> source(in), out(32);
  require(arch::launch(shuffle_kernel<T>, dim3(1), dim3(32), 0, nullptr, source.read(), out.get(), form, mask, argument,
                       width));
  auto wanted = in;
  for (int lane = 0; lane < 32; ++lane) {
    const int first = lane / width * width;
    int from = first + argument % width;
    if (form == Form::up) from = lane - argument < first ? lane : lane - argument;
    if (form == Form::down) from = lane + argument >= first + width ? lane : lane + argument;
    if (form == Form::exchange) from = (lane ^ argument) >= first + width ? lane : lane ^ argument;
    wanted[lane] = in[from];
  }
  return out.values() == wanted;
}

void test_shuffles() {
  const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  for (const Form form : {Form::index, Form::up, Form::down, Form::exchange}) {
    bool passed = true;
    for (int width = 1; width <= 32; width *= 2) {
      for (const int argument : {0, 1, 2, 3, 7, 8, 16, 31}) {
        passed &= shuffles_agree<int>(form, kAll, argument, width);
        if (width <= 16) passed &= shuffles_agree<int>(form, 0xffffu, argument & 15, width);  // two halves
      }
    }
    passed &= shuffles_agree<unsigned>(form, kAll, 1, 32) && shuffles_agree<float>(form, kAll, 2, 32) &&
              shuffles_agree<double>(form, kAll, 4, 16) && shuffles_agree<long long>(form, kAll, 5, 32);
    expect(names[static_cast<int>(form)], passed);
  }
}

__global__ void vote_kernel(const int* in, uint32_t* out, uint32_t mask) {
  const int t = threadIdx.x;
  if (!(mask >> t & 1)) return;
  out[t] = __ballot_sync(mask, in[t] & 1) + 0;
  out[32 + t] = __any_sync(mask, in[t] & 2) != 0;
  out[64 + t] = __all_sync(mask, in[t] & 4) != 0;
  out[96 + t] = static_cast<uint32_t>(__reduce_add_sync(mask, in[t]));
  out[128 + t] = static_cast<uint32_t>(__reduce_min_sync(mask, in[t]));
  out[160 + t] = static_cast<uint32_t>(__reduce_max_sync(mask, in[t]));
  out[192 + t] = __reduce_add_sync(mask, static_cast<unsigned>(in[t]));
  out[224 + t] = __reduce_min_sync(mask, static_cast<unsigned>(in[t]));
  out[256 + t] = __reduce_max_sync(mask, static_cast<unsigned>(in[t]));
}

void test_votes() {
  const char* names[] = {"__ballot_sync",
                         "__any_sync",
                         "__all_sync",
                         "__reduce_add_sync, int",
                         "__reduce_min_sync, int",
                         "__reduce_max_sync, int",
                         "__reduce_add_sync",
                         "__reduce_min_sync",
                         "__reduce_max_sync"};
  bool passed[9];
  for (bool& p : passed) p = true;
  for (const uint32_t mask : {kAll, 0x0000ffffu, 0x80000001u, 0x00000010u, 0x5a5a1234u}) {
    for (const int set : {0, 1, 2, 4, 7}) {  // bits that all or none have
      auto in = random_bits<int>(32);
      for (int& v : in) v = generator() % 2 ? v | set : v & ~(7 & ~set);
      if (set == 7) {
        for (int& v : in) v |= 7;
      }
      Device<int> source(in);
      Device<uint32_t> out(std::vector<uint32_t>(9 * 32, 0));
      require(arch::launch(vote_kernel, dim3(1), dim3(32), 0, nullptr, source.read(), out.get(), mask));
      uint32_t ballot = 0, any = 0, all = 1, sum = 0, unsigned_min = kAll, unsigned_max = 0;
      int least = std::numeric_limits<int>::max(), most = std::numeric_limits<int>::min();
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const int v = in[lane];
        const auto u = static_cast<uint32_t>(v);
        ballot |= (u & 1) << lane, any |= (u & 2) != 0, all &= (u & 4) != 0, sum += u;
        least = std::min(least, v), most = std::max(most, v);
        unsigned_min = std::min(unsigned_min, u), unsigned_max = std::max(unsigned_max, u);
      }
      const uint32_t wanted[] = {
          ballot, any,          all,         sum, static_cast<uint32_t>(least), static_cast<uint32_t>(most),
          sum,    unsigned_min, unsigned_max};
      const auto values = out.values();
      for (int i = 0; i < 9 * 32; ++i) passed[i / 32] &= values[i] == (mask >> i % 32 & 1 ? wanted[i / 32] : 0);
    }
  }
  for (int i = 0; i < 9; ++i) expect(names[i], passed[i]);
}

// The last warp has 8 lanes; a full mask names those that there are.
__global__ void small_warp_kernel(uint32_t* out) {
  const int t = threadIdx.x;
  const int next = __shfl_xor_sync(kAll, t, 1);
  out[t] = __ballot_sync(kAll, t % 3 == 0) + 0x10000u * next;
}

void test_small_warp() {
  Device<uint32_t> out(40);
  require(arch::launch(small_warp_kernel, dim3(1), dim3(40), 0, nullptr, out.get()));
  const auto values = out.values();
  bool passed = true;
  for (uint32_t t = 32; t < 40; ++t) passed &= values[t] == 0x92u + 0x10000u * (t ^ 1);  // 33, 36, 39
  expect("a warp of 8 lanes", passed);
}

__global__ void syncwarp_kernel(const int* in, int* out) {
  BIFLOW_SHARED(int, values, [64]);
  const int t = threadIdx.x;
  int v = in[t];
  for (int i = 0; i < 3; ++i) {
    values[t] = v;
    __syncwarp();
    v = values[t ^ 5] + 1;
    __syncwarp();
  }
  out[t] = v;
}

void test_syncwarp() {
  auto in = random_bits<int>(64);
  for (int& v : in) v &= 0xffff;
  Device<int> source(in), out(64);
  require(arch::launch(syncwarp_kernel, dim3(1), dim3(64), 0, nullptr, source.read(), out.get()));
  auto wanted = in;
  for (int t = 0; t < 64; ++t) wanted[t] = in[t ^ 5] + 3;  // an odd number of swaps
  expect("__syncwarp", out.values() == wanted);
}

}  // namespace

int main(int argc, char** argv) {
#ifndef __CUDACC__
  if (argc == 4) {
    const auto choice = [argv](int i, const char* second, const char* third) {
      return std::strcmp(argv[i], second) == 0 ? 1 : std::strcmp(argv[i], third) == 0 ? 2 : 0;
    };
    emulator_configure(choice(1, "reverse", "random"), std::strtoull(argv[2], nullptr, 10),
                       choice(3, "eager", "random"));
  }
#else
  (void)argc, (void)argv;
#endif
  try {
    test_places();
    test_barriers();
    test_shared();
    test_refused_launches();
    test_shuffles();
    test_votes();
    test_syncwarp();
    test_small_warp();
    test_memory();
    test_tensor_cores();
    test_arithmetic();
    test_blocks();
  } catch (const std::exception& error) {  // what the emulator found
    expect(error.what(), false);
  }
  std::printf("%d checks failed\n", failed_checks());
  return failed_checks() != 0;
}
