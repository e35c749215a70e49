// The host side of arch.cuh: the names of device.cuh over the emulator in tests/emulator, whose build alone includes
// it. What each does, and the layout of fragments: device.cuh.
#pragma once

#include <cfloat>

#include "emulator/cuda.h"

#define BIFLOW_SHARED(type, name, ...)                                 \
  typedef type name##_type __VA_ARGS__;                                \
  static char name##_key;                                              \
  auto& name = *static_cast<name##_type*>(::emulator::shared_variable( \
      &name##_key, sizeof(name##_type), alignof(name##_type), #name, ::emulator::Location::here()))
#define BIFLOW_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared(::emulator::Location::here())
#define BIFLOW_DEVICE inline
#define BIFLOW_HOST_DEVICE inline

namespace biflow::arch {

// --- launches ---------------------------------------------------------------------------------------------------

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A&&... arguments) {
  return emulator::launch(kernel, grid, block, shared, false, static_cast<A&&>(arguments)...);
}

template <class... P>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                               P... arguments) {
  return emulator::launch(kernel, grid, block, shared, true, arguments...);
}

inline cudaError_t taken(cudaError_t status) { return status; }
inline int multiprocessors() { return emulator::kMultiprocessors; }
inline bool takes_cooperative_launches() { return true; }
inline size_t shared_memory_limit() { return emulator::kSharedLimit; }

// --- tensor cores -----------------------------------------------------------------------------------------------

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], EMULATOR_AT) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emulator::mma_m16n8k16(std::is_same_v<T, __half>, d, a, b, c, at);
}

// --- shared memory ----------------------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_AT) { emulator::ldmatrix(4, false, r, row, at); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, EMULATOR_AT) {
  emulator::ldmatrix(4, true, r, row, at);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_AT) { emulator::ldmatrix(2, false, r, row, at); }
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row, EMULATOR_AT) {
  emulator::ldmatrix(2, true, r, row, at);
}

inline void cp_async_16(void* to, const void* from, bool read = true, EMULATOR_AT) {
  emulator::copy_async(to, from, read, at);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::copy_wait(kPending);
}

// --- global memory ----------------------------------------------------------------------------------------------

// g++ does not check the alignment of assignments to structs.
template <class Word>
void store_word(Word* p, Word v) {
  emulator::require_alignment(p, sizeof(Word));
  *p = v;
}

template <class Word>
void store_global(Word* p, Word v) {
  store_word(p, v);
}

// --- between blocks ---------------------------------------------------------------------------------------------

inline void release_fence() { emulator::release_fence(); }
inline void acquire_fence() { emulator::acquire_fence(); }

EMULATOR_UNCHECKED inline uint32_t load_relaxed(const uint32_t* p, EMULATOR_AT) {
  emulator::atomic(p, sizeof(*p), emulator::Atomic::load, at);
  return *p;
}
EMULATOR_UNCHECKED inline void store_relaxed(uint32_t* p, uint32_t v, EMULATOR_AT) {
  emulator::atomic(p, sizeof(*p), emulator::Atomic::store, at);
  *p = v;
}
inline void add_relaxed(uint32_t* p, uint32_t v, EMULATOR_AT) { atomicAdd(p, v, at); }
inline uint32_t fetch_add_relaxed(uint32_t* p, uint32_t v, EMULATOR_AT) { return atomicAdd(p, v, at); }

inline void spin(uint32_t = 0, EMULATOR_AT) { emulator::spin(at); }
inline void grid_sync(EMULATOR_AT) { emulator::grid_barrier(at); }

// --- arithmetic -------------------------------------------------------------------------------------------------

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline float rsqrt_fast(float x) { return 1.0f / sqrtf(x); }

}  // namespace biflow::arch
