// The GPU side of arch.cuh.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// `BIFLOW_SHARED(float, sums, [kWarps][2]);` declares static shared memory.
#define BIFLOW_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// `BIFLOW_DYNAMIC_SHARED(bytes);` is the launch's dynamic shared memory: unsigned char*, 128-byte aligned.
#define BIFLOW_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define BIFLOW_DEVICE __device__ __forceinline__
#define BIFLOW_HOST_DEVICE __host__ __device__ __forceinline__

namespace biflow::arch {

// --- launches ---------------------------------------------------------------------------------------------------

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Whether the current device takes cooperative launches.
inline bool takes_cooperative_launches() {
  int device = 0, takes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&takes, cudaDevAttrCooperativeLaunch, device);
  return takes != 0;
}

// Bytes of shared memory that one block of the current device may ask for.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

// status, an error no longer the runtime's last one: the next launch must not find it there.
inline cudaError_t taken(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Lets launches of `kernel` on the current device have `shared` bytes. More than 48 KB must be asked for: the first
// launch asks for all that there is, since threads would take the difference from each other.
inline cudaError_t allow_shared_memory(const void* kernel, size_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  cudaFuncAttributes has;
  if (const auto status = cudaFuncGetAttributes(&has, kernel); status != cudaSuccess) return taken(status);
  const size_t most = shared_memory_limit() - has.sharedSizeBytes;
  if (shared > most) return cudaErrorInvalidValue;
  if (static_cast<size_t>(has.maxDynamicSharedSizeBytes) >= most) return cudaSuccess;
  return taken(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
}

// kernel<<<grid, block, shared, stream>>>(arguments...).
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A&&... arguments) {
  const auto status = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared);
  if (status != cudaSuccess) return status;
  kernel<<<grid, block, shared, stream>>>(static_cast<A&&>(arguments)...);
  return cudaGetLastError();
}

// The same as a cooperative launch: all blocks are resident at once, or nothing runs and an error comes back.
template <class... P>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                               P... arguments) {
  const auto function = reinterpret_cast<const void*>(kernel);
  const auto status = allow_shared_memory(function, shared);
  if (status != cudaSuccess) return status;
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return taken(cudaLaunchCooperativeKernel(function, grid, block, pointers, shared, stream));
}

// --- tensor cores -----------------------------------------------------------------------------------------------
// Fragments of one m16n8k16 product by lane l, g = l / 4, t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[0] rows g, columns 2t, 2t+1; a[1] rows g+8; a[2] rows g, columns 2t+8, 2t+9; a[3] rows g+8, the same columns
//   b[0] rows 2t, 2t+1, column g; b[1] rows 2t+8, 2t+9
//   c, d: [0], [1] row g, columns 2t, 2t+1; [2], [3] row g+8

// d = a b + c in fp32, of bf16 or half operands.
template <class T>
BIFLOW_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

template <>
BIFLOW_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                               const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
BIFLOW_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                        const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// --- shared memory ----------------------------------------------------------------------------------------------

BIFLOW_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 8x8 matrices of 16-bit elements: lane l passes the address of row l % 8 of matrix l / 8 (16-byte aligned) and gets
// of each matrix the elements (l / 4, 2 (l % 4)) and the one right of it; _transposed: of each matrix's transpose.
BIFLOW_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

BIFLOW_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with two matrices, whose rows lanes 0 to 15 address.
BIFLOW_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

BIFLOW_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes from global to shared memory (both 16-byte aligned) without waiting; read: false writes zeros and
// does not touch the source. The bytes are there for this thread after cp_async_wait, for others after a barrier too.
BIFLOW_DEVICE void cp_async_16(void* to, const void* from, bool read = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read ? 16 : 0)
               : "memory");
}

// Closes a group of copies.
BIFLOW_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending youngest groups of this thread are under way.
template <int kPending>
BIFLOW_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- global memory ----------------------------------------------------------------------------------------------

template <class Word>
BIFLOW_DEVICE void store_word(Word* p, Word v) {
  *p = v;
}

// The same to global memory, as one instruction. A plain store may become several: where branches meet, the compiler
// forgets the alignment.
template <class Word>
BIFLOW_DEVICE void store_global(Word* p, Word v) {
  const size_t to = __cvta_generic_to_global(p);
  if constexpr (sizeof(Word) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  else if constexpr (sizeof(Word) == 8)
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
  else if constexpr (sizeof(Word) == 4)
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
  else
    *p = v;
}

// --- between blocks ---------------------------------------------------------------------------------------------
// To publish: write, release_fence, then a relaxed atomic on a flag. To receive: load_relaxed until the flag shows it
// (spin() in the loop), acquire_fence, then read. The fences are fence.acq_rel.gpu: __threadfence() is the stronger and
// slower fence.sc.

BIFLOW_DEVICE void release_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
BIFLOW_DEVICE void acquire_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

BIFLOW_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

BIFLOW_DEVICE void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

BIFLOW_DEVICE void add_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

BIFLOW_DEVICE uint32_t fetch_add_relaxed(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

// In a loop that waits for other blocks; turn: of the loop. With BIFLOW_WATCHDOG (CMake) a kernel that waits for
// millions of turns, some seconds, ends with an error instead of holding the GPU for ever.
BIFLOW_DEVICE void spin(uint32_t turn = 0) {
#ifdef BIFLOW_WATCHDOG
  if (turn == 1u << 23) __trap();
#else
  (void)turn;
#endif
}

// cooperative_groups' barrier over all blocks of a cooperative launch.
BIFLOW_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// --- arithmetic -------------------------------------------------------------------------------------------------

// 2^x: ex2.approx, 2 ulp, denormal results flushed to 0.
BIFLOW_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x): rsqrt.approx, 2 ulp.
BIFLOW_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace biflow::arch
