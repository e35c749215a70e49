// What decides how the sequential inverse is built: the time of a barrier over all blocks, ours and cooperative
// groups', and the rate at which all multiprocessors together read a set of weights again and again (is it in the L2?).
// Prints one JSON object a line.
#include <cstdio>
#include <vector>

#include "arch/arch.cuh"
#include "arch/grid_barrier.cuh"

namespace {

using biflow::arch::GridBarrier;

constexpr int kThreads = 256;

__global__ void barriers(GridBarrier* barrier, int count) {
  for (int i = 0; i < count; ++i) biflow::arch::grid_barrier(barrier, i + 1);
}

__global__ void grid_syncs(int count) {
  for (int i = 0; i < count; ++i) biflow::arch::grid_sync();
}

// Every block reads its share of `words` 16-byte words, `passes` times over, eight loads in flight a thread.
__global__ void read_shares(const uint4* data, int64_t words, int passes, unsigned* out) {
  constexpr int kFlight = 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned sum = 0;
  for (int pass = 0; pass < passes; ++pass)
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += kFlight * step) {
      uint4 v[kFlight];
#pragma unroll
      for (int k = 0; k < kFlight; ++k) v[k] = i + k * step < words ? __ldcg(data + i + k * step) : uint4{};
#pragma unroll
      for (int k = 0; k < kFlight; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
  if (sum == 0x12345678u) *out = sum;  // keeps the loads
}

constexpr const char* kNoTime = "took no measurable time";
const char* failure = kNoTime;  // why the measurement under way fails, if it does

bool check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return true;
  failure = cudaGetErrorString(status);
  std::fprintf(stderr, "%s: %s\n", what, failure);
  return false;
}

// The rest of a row: what `many` and `few` runs in seconds say, or why they say nothing.
template <class F>
bool finish(double many, double few, F&& number) {
  const bool good = few > 0 && many > few;
  if (good)
    number(many - few);
  else
    std::printf("\"failed\": \"%s\"}\n", failure);
  failure = kNoTime;
  return good;
}

// Seconds of run(), the best of five; -1: it failed.
template <class F>
double seconds(F&& run) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  float best = 1e30f;
  for (int i = 0; i < 6; ++i) {
    cudaEventRecord(start);
    if (!check(run(), "launch")) return -1;
    cudaEventRecord(stop);
    if (!check(cudaEventSynchronize(stop), "run")) return -1;
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (i > 0 && ms < best) best = ms;
  }
  return best * 1e-3;
}

}  // namespace

int main() {
  namespace arch = biflow::arch;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // whole rows, whatever goes to stderr in between
  const int blocks = arch::multiprocessors();
  GridBarrier* barrier = nullptr;
  if (!check(cudaMalloc(reinterpret_cast<void**>(&barrier), sizeof(GridBarrier)), "cudaMalloc")) return 1;
  bool good = true;
  const auto report = [&](const char* name, int count, double many, double few) {
    std::printf("{\"number\": \"grid barrier, %s\", \"blocks\": %d, ", name, blocks);
    const auto print = [&](double time) { std::printf("\"us\": %.4f}\n", time / (count - 1) * 1e6); };
    good = finish(many, few, print) && good;
  };
  constexpr int kCount = 10000;
  const auto ours = [&](int count) {
    return seconds([&] {
      cudaMemsetAsync(barrier, 0, sizeof(GridBarrier));
      return arch::launch_cooperative(barriers, dim3(blocks), dim3(kThreads), 0, nullptr, barrier, count);
    });
  };
  report("ours", kCount, ours(kCount), ours(1));
  const auto syncs = [&](int count) {
    return seconds(
        [&] { return arch::launch_cooperative(grid_syncs, dim3(blocks), dim3(kThreads), 0, nullptr, count); });
  };
  report("cooperative groups", kCount, syncs(kCount), syncs(1));

  unsigned* out = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&out), sizeof(unsigned));
  // a block of S; activations that every block rereads; a block of B/2; half and all of an L2; a set that leaves it
  for (const double megabytes : {0.8, 3.1, 14.0, 28.4, 45.0, 60.0, 113.0, 1000.0}) {
    const int64_t words = static_cast<int64_t>(megabytes * 1e6 / 16);
    uint4* data = nullptr;
    if (!check(cudaMalloc(reinterpret_cast<void**>(&data), words * 16), "cudaMalloc")) return 1;
    cudaMemset(data, 0x5a, words * 16);
    const int passes = static_cast<int>(4e9 / (words * 16.0)) + 2;
    for (const int per_multiprocessor : {1, 4}) {
      const auto run = [&](int count) {
        return seconds([&] {
          return arch::launch(read_shares, dim3(blocks * per_multiprocessor), dim3(kThreads), 0, nullptr,
                              static_cast<const uint4*>(data), words, count, out);
        });
      };
      std::printf("{\"number\": \"weights read by all\", \"mb\": %.1f, \"blocks\": %d, ", megabytes,
                  blocks * per_multiprocessor);
      const auto print = [&](double time) {
        std::printf("\"gb_s\": %.0f}\n", words * 16.0 * (passes - 1) / time / 1e9);
      };
      good = finish(run(passes), run(1), print) && good;
    }
    cudaFree(data);
  }
  return good ? 0 : 1;
}
