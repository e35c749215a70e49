// Conformance: atomics, loads and stores, asynchronous copies. See conformance.cu.
#include <algorithm>

#include "emulator/testing.h"

namespace biflow::test {
namespace {

// --- atomics ------------------------------------------------------------------------------------------------------

// 8 counters, each in its way; `old` gets what atomicAdd returned.
__global__ void atomics_kernel(const int* in, int* counters, unsigned* old, float* sum) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, v = in[i];
  old[i] = atomicAdd(reinterpret_cast<unsigned*>(counters), 1u);
  atomicSub(counters + 1, v);
  atomicMin(counters + 2, v);
  atomicMax(counters + 3, v);
  atomicAnd(counters + 4, v);
  atomicOr(counters + 5, v);
  atomicXor(counters + 6, v);
  int seen = 0, before;  // adds v by compare and swap
  while ((before = atomicCAS(counters + 7, seen, seen + v)) != seen) seen = before;
  atomicAdd(sum, static_cast<float>(v & 15));
}

// A chain of exchanges: every value is handed on exactly once.
__global__ void exchange_kernel(unsigned* slot, unsigned* got) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  got[i] = atomicExch(slot, i + 1);
}

void test_atomics() {
  const int n = 3 * 70;
  auto in = random_bits<int>(n);
  for (int& v : in) v &= 0xfffff;
  Device<int> source(in), counters(std::vector<int>{0, 0, 1 << 30, -5, -1, 0, 0, 0});
  Device<unsigned> old(n);
  Device<float> sum(std::vector<float>{0});
  require(
      arch::launch(atomics_kernel, dim3(3), dim3(70), 0, nullptr, source.read(), counters.get(), old.get(), sum.get()));
  int wanted[8] = {n, 0, 1 << 30, -5, -1, 0, 0, 0};
  float total = 0;
  for (const int v : in) {
    wanted[1] -= v, wanted[2] = std::min(wanted[2], v), wanted[3] = std::max(wanted[3], v);
    wanted[4] &= v, wanted[5] |= v, wanted[6] ^= v, wanted[7] += v;
    total += static_cast<float>(v & 15);
  }
  const auto got = counters.values();
  const char* names[] = {"atomicAdd", "atomicSub", "atomicMin", "atomicMax",
                         "atomicAnd", "atomicOr",  "atomicXor", "atomicCAS"};
  for (int i = 0; i < 8; ++i) expect(names[i], got[i] == wanted[i]);
  expect("atomicAdd, float", sum.values()[0] == total);
  auto tickets = old.values();
  std::sort(tickets.begin(), tickets.end());
  bool each_once = true;
  for (unsigned i = 0; i < n; ++i) each_once &= tickets[i] == i;
  expect("atomicAdd returns the old value", each_once);

  Device<unsigned> slot(std::vector<unsigned>{0}), handed(n);
  require(arch::launch(exchange_kernel, dim3(3), dim3(70), 0, nullptr, slot.get(), handed.get()));
  auto all = handed.values();
  all.push_back(slot.values()[0]);
  std::sort(all.begin(), all.end());
  each_once = true;
  for (unsigned i = 0; i <= n; ++i) each_once &= all[i] == i;
  expect("atomicExch", each_once);
}

// --- loads and stores ---------------------------------------------------------------------------------------------

__global__ void hints_kernel(const float4* in, float4* out) {
  const int t = threadIdx.x;
  const float4 a = __ldg(in + t), b = __ldcg(in + 32 + t), c = __ldcs(in + 64 + t);
  __stcg(out + t, a);
  __stcs(out + 32 + t, b);
  arch::store_word(out + 64 + t, c);
}

template <class T, int n>
__global__ void vector_kernel(const T* in, T* out) {
  const int i = threadIdx.x * n;
  const auto v = arch::Vector<T, n>::load(in + i);
  arch::Vector<T, n> w;
  for (int k = 0; k < n; ++k) w.v[k] = v.v[n - 1 - k];
  threadIdx.x % 2 ? w.store(out + i) : w.store_global(out + i);
}

template <class T, int n>
bool vectors_agree() {
  const auto in = convert<T>(random_floats(32 * n));
  Device<T> source(in), out(32 * n);
  require(arch::launch(vector_kernel<T, n>, dim3(1), dim3(32), 0, nullptr, source.read(), out.get()));
  const auto values = out.values();
  bool same = true;
  for (int i = 0; i < 32 * n; ++i) {
    same &= arch::to_float(values[i]) == arch::to_float(in[i / n * n + n - 1 - i % n]);
  }
  return same;
}

void test_loads() {
  const auto in = random_floats(96 * 4);
  Device<float> source(in), out(96 * 4);
  require(arch::launch(hints_kernel, dim3(1), dim3(32), 0, nullptr, reinterpret_cast<const float4*>(source.read()),
                       reinterpret_cast<float4*>(out.get())));
  expect("__ldg, __ldcg, __ldcs, __stcg, __stcs", out.values() == in);
  expect("Vector of float", vectors_agree<float, 1>() && vectors_agree<float, 2>() && vectors_agree<float, 8>());
  expect("Vector of bf16",
         vectors_agree<arch::bf16, 1>() && vectors_agree<arch::bf16, 4>() && vectors_agree<arch::bf16, 16>());
  expect("Vector of half",
         vectors_agree<arch::half, 1>() && vectors_agree<arch::half, 2>() && vectors_agree<arch::half, 8>());
}

// --- asynchronous copies --------------------------------------------------------------------------------------------

// A ring of three slots, each filled by a group of copies while the one before is summed; pieces of 16 bytes from
// `limit` on are not read and count as zero.
__global__ void ring_kernel(const uint4* in, uint32_t* out, int rounds, int limit) {
  BIFLOW_SHARED(uint4, ring, [3][64]);
  const int t = threadIdx.x;
  const auto fetch = [&](int round) {
    if (round < rounds) {
      const bool read = round * 64 + t < limit;
      arch::cp_async_16(&ring[round % 3][t], in + (read ? round * 64 + t : 0), read);
    }
    arch::cp_async_commit();
  };
  fetch(0);
  fetch(1);
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 2);
    arch::cp_async_wait<2>();
    __syncthreads();
    const uint4 v = ring[round % 3][63 - t];
    sum = sum * 31 + (v.x ^ v.y ^ v.z ^ v.w);
    __syncthreads();
  }
  out[t] = sum;
}

// Two copies in one group, and copies that no group holds when others are waited for.
__global__ void groups_kernel(const uint4* in, uint4* out) {
  BIFLOW_SHARED(uint4, slots, [32][3]);
  const int t = threadIdx.x;
  arch::cp_async_16(&slots[t][0], in + 3 * t);
  arch::cp_async_16(&slots[t][1], in + 3 * t + 1);
  arch::cp_async_commit();
  arch::cp_async_16(&slots[t][2], in + 3 * t + 2);
  arch::cp_async_wait<0>();
  out[3 * t] = slots[t][0];
  out[3 * t + 1] = slots[t][1];
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  out[3 * t + 2] = slots[t][2];
}

void test_copies() {
  const int rounds = 5, limit = 5 * 64 - 37;
  const auto in = random_bits<uint32_t>(rounds * 64 * 4);
  Device<uint32_t> source(in), out(64);
  const auto pieces = reinterpret_cast<const uint4*>(source.read());
  require(arch::launch(ring_kernel, dim3(1), dim3(64), 0, nullptr, pieces, out.get(), rounds, limit));
  std::vector<uint32_t> wanted(64, 0);
  for (int round = 0; round < rounds; ++round) {
    for (int t = 0; t < 64; ++t) {
      const int piece = round * 64 + 63 - t;
      const uint32_t* v = &in[piece * 4];
      wanted[t] = wanted[t] * 31 + (piece < limit ? v[0] ^ v[1] ^ v[2] ^ v[3] : 0);
    }
  }
  expect("cp_async_16, commit, wait<2>: three groups in flight", out.values() == wanted);

  Device<uint32_t> copied(96 * 4);
  require(arch::launch(groups_kernel, dim3(1), dim3(32), 0, nullptr, pieces, reinterpret_cast<uint4*>(copied.get())));
  expect("cp_async: copies of one group, wait<0>",
         copied.values() == std::vector<uint32_t>(in.begin(), in.begin() + 96 * 4));
}

}  // namespace

void test_memory() {
  test_atomics();
  test_loads();
  test_copies();
}

}  // namespace biflow::test
