// Conformance: blocks that talk to each other. See conformance.cu.
#include "arch/grid_barrier.cuh"
#include "emulator/testing.h"

namespace biflow::test {
namespace {

// --- messages -------------------------------------------------------------------------------------------------------

// Block 0 writes a message and raises the flag, block b waits for flag b, adds its number and raises flag b + 1.
__global__ void relay_kernel(uint32_t* message, uint32_t* flags, int words) {
  const uint32_t b = blockIdx.x;
  if (threadIdx.x == 0 && b > 0) {
    while (arch::load_relaxed(&flags[b]) == 0) arch::spin();
    arch::acquire_fence();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < words; i += blockDim.x) message[i] = (b == 0 ? i : message[i]) * 3 + b;
  __syncthreads();
  if (threadIdx.x == 0) {
    arch::release_fence();
    arch::store_relaxed(&flags[b + 1], 1);
  }
}

// Every block writes its part; the one that takes the last ticket adds all up. add_relaxed counts finished threads.
__global__ void ticket_kernel(const uint32_t* in, uint32_t* parts, uint32_t* counters, uint32_t* out, int count) {
  BIFLOW_SHARED(uint32_t, last);
  BIFLOW_SHARED(uint32_t, sum);
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) atomicAdd(&sum, in[i]);
  arch::add_relaxed(&counters[1], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    __threadfence();
    last = arch::fetch_add_relaxed(&counters[0], 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last != 0 && threadIdx.x == 0) {
    uint32_t total = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) total += parts[b];
    *out = total;
  }
}

void test_messages() {
  const int words = 200;
  const uint32_t blocks = 4;
  Device<uint32_t> message(words), flags(std::vector<uint32_t>(blocks + 1, 0));
  require(
      arch::launch_cooperative(relay_kernel, dim3(blocks), dim3(64), 0, nullptr, message.get(), flags.get(), words));
  std::vector<uint32_t> wanted(words);
  for (int i = 0; i < words; ++i) {
    wanted[i] = i;
    for (uint32_t b = 0; b < blocks; ++b) wanted[i] = wanted[i] * 3 + b;
  }
  expect("release_fence, store_relaxed, load_relaxed, acquire_fence", message.values() == wanted);

  const auto in = random_bits<uint32_t>(1000);
  Device<uint32_t> source(in), parts(7), counters(std::vector<uint32_t>{0, 0}), out(1);
  require(arch::launch(ticket_kernel, dim3(7), dim3(96), 0, nullptr, source.read(), parts.get(), counters.get(),
                       out.get(), 1000));
  uint32_t total = 0;
  for (const uint32_t v : in) total += v;
  expect("fetch_add_relaxed, __threadfence: the last block sums up", out.values()[0] == total);
  expect("add_relaxed", counters.values() == std::vector<uint32_t>({7, 7 * 96}));
}

// --- barriers of the grid -------------------------------------------------------------------------------------------

// Steps x[i] <- x[i - 1] + 3 x[i + 1] on a ring, from one buffer into the other, a barrier after each.
template <bool kOurs>
__global__ void ring_kernel(uint32_t* even, uint32_t* odd, int n, int steps, arch::GridBarrier* barrier) {
  for (int step = 0; step < steps; ++step) {
    const uint32_t* from = step % 2 ? odd : even;
    uint32_t* to = step % 2 ? even : odd;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
      to[i] = from[(i + n - 1) % n] + 3 * from[(i + 1) % n];
    }
    if constexpr (kOurs) {
      arch::grid_barrier(barrier, step + 1);
    } else {
      arch::grid_sync();
    }
  }
}

template <bool kOurs>
void test_barrier(const char* name, uint32_t blocks) {
  const int n = 700, steps = 6;
  auto x = random_bits<uint32_t>(n);
  Device<uint32_t> even(x), odd(n);
  Device<arch::GridBarrier> barrier(std::vector<arch::GridBarrier>(1));
  require(arch::launch_cooperative(ring_kernel<kOurs>, dim3(blocks), dim3(64), 0, nullptr, even.get(), odd.get(), n,
                                   steps, barrier.get()));
  for (int step = 0; step < steps; ++step) {
    auto next = x;
    for (int i = 0; i < n; ++i) next[i] = x[(i + n - 1) % n] + 3 * x[(i + 1) % n];
    x = next;
  }
  expect(std::string(name) + " of " + std::to_string(blocks) + " blocks", even.values() == x);
}

}  // namespace

void test_blocks() {
  test_messages();
  for (const uint32_t blocks : {1u, 3u, 8u, 11u}) {
    test_barrier<false>("grid_sync", blocks);
    test_barrier<true>("grid_barrier", blocks);
  }
}

}  // namespace biflow::test
