// CUDA as kernels see it, on the host: the names of nvcc's built-in functions over engine.h. Included by
// csrc/arch/emulated.cuh only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/engine.h"

#define threadIdx (::emulator::context.thread)
#define blockIdx (::emulator::context.block)
#define blockDim (::emulator::context.block_size)
#define gridDim (::emulator::context.grid_size)
constexpr int warpSize = 32;

// g++ drops section attributes of statics in templates, so shared memory goes through BIFLOW_SHARED.
#undef __shared__
#define __shared__ use_BIFLOW_SHARED_or_BIFLOW_DYNAMIC_SHARED
#undef __launch_bounds__
#define __launch_bounds__(...)

// The last parameter of everything that may fail: the place of the call.
#define EMULATOR_AT ::emulator::Location at = ::emulator::Location::here()

// --- barriers ---------------------------------------------------------------------------------------------------

inline void __syncthreads(EMULATOR_AT) { emulator::block_barrier(at); }
inline int __syncthreads_and(int p, EMULATOR_AT) { return emulator::block_vote(emulator::Vote::all, p != 0, at); }
inline int __syncthreads_or(int p, EMULATOR_AT) { return emulator::block_vote(emulator::Vote::any, p != 0, at); }
inline int __syncthreads_count(int p, EMULATOR_AT) { return emulator::block_vote(emulator::Vote::count, p != 0, at); }
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_AT) { emulator::warp_barrier(mask, at); }

inline void __threadfence() {
  emulator::acquire_fence();
  emulator::release_fence();
}

// --- warp shuffles, votes, reductions -----------------------------------------------------------------------------

namespace emulator {
template <class T>
T shuffled(Shuffle kind, uint32_t mask, T value, int argument, int width, Location at) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_AT) {
  return emulator::shuffled(emulator::Shuffle::index, mask, value, lane, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_AT) {
  return emulator::shuffled(emulator::Shuffle::up, mask, value, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_AT) {
  return emulator::shuffled(emulator::Shuffle::down, mask, value, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_AT) {
  return emulator::shuffled(emulator::Shuffle::exchange, mask, value, lanes, width, at);
}

inline unsigned __ballot_sync(unsigned mask, int p, EMULATOR_AT) { return emulator::ballot(mask, p != 0, at); }
inline int __any_sync(unsigned mask, int p, EMULATOR_AT) { return emulator::ballot(mask, p != 0, at) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATOR_AT) { return emulator::ballot(mask, p == 0, at) == 0; }

template <class T>
T __reduce_add_sync(unsigned mask, T value, EMULATOR_AT) {
  static_assert(sizeof(T) == 4, "int or unsigned");
  return static_cast<T>(emulator::reduce(emulator::Reduce::add, mask, value, at));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, EMULATOR_AT) {
  static_assert(sizeof(T) == 4, "int or unsigned");
  return static_cast<T>(emulator::reduce(emulator::Reduce::min, mask, value, at));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, EMULATOR_AT) {
  static_assert(sizeof(T) == 4, "int or unsigned");
  return static_cast<T>(emulator::reduce(emulator::Reduce::max, mask, value, at));
}

// --- atomics: one thread runs at a time, so plain accesses, which the checker learns of beforehand -----------------

#define EMULATOR_ATOMIC(name, result)                             \
  template <class T>                                              \
  EMULATOR_UNCHECKED T name(T* p, T v, EMULATOR_AT) {             \
    emulator::atomic(p, sizeof(T), emulator::Atomic::update, at); \
    const T old = *p;                                             \
    *p = static_cast<T>(result);                                  \
    return old;                                                   \
  }
EMULATOR_ATOMIC(atomicAdd, old + v)
EMULATOR_ATOMIC(atomicSub, old - v)
EMULATOR_ATOMIC(atomicMin, old < v ? old : v)
EMULATOR_ATOMIC(atomicMax, old > v ? old : v)
EMULATOR_ATOMIC(atomicExch, v)
EMULATOR_ATOMIC(atomicAnd, old& v)
EMULATOR_ATOMIC(atomicOr, old | v)
EMULATOR_ATOMIC(atomicXor, old ^ v)
#undef EMULATOR_ATOMIC

template <class T>
EMULATOR_UNCHECKED T atomicCAS(T* p, T compare, T v, EMULATOR_AT) {
  emulator::atomic(p, sizeof(T), emulator::Atomic::update, at);
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}

// --- loads and stores with a cache hint -----------------------------------------------------------------------------

template <class T>
T __ldg(const T* p, EMULATOR_AT) {
  emulator::read_only(p, sizeof(T), at);
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? a * 0.0f : a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? fminf(x, 1.0f) : 0.0f; }

namespace emulator {
template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To r;
  std::memcpy(&r, &v, sizeof(r));
  return r;
}
}  // namespace emulator
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
