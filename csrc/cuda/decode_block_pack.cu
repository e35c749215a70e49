// Weights into the layout that the kernels of decode_block read (csrc/block.h).
#include "arch/arch.cuh"
#include "decode_block.h"

namespace biflow::cuda {
namespace {

constexpr int kThreads = 256;

// The row of the state_dict's tensor that packed column c holds.
BIFLOW_DEVICE int64_t source_row(int64_t c, int64_t half) { return half == 0 ? c : c / 2 + (c % 2 == 0 ? 0 : half); }

// A weight (rows, columns) in fragments: a thread writes 16 bytes.
template <class T>
__global__ void pack_fragments(const PackedSource to, const float* from, uint4* packed, int64_t pieces) {
  constexpr int kInputs = 16 / sizeof(T);
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t blocks = (to.columns + 4 * kInputs - 1) / (4 * kInputs);
  const int lane = static_cast<int>(piece % 32);
  const int64_t column = piece / 32 / blocks * kFragmentColumns + lane / 4;
  const int64_t first = piece / 32 % blocks * (4 * kInputs) + lane % 4 * kInputs;
  arch::Vector<T, kInputs> v;
#pragma unroll
  for (int i = 0; i < kInputs; ++i) {
    const bool inside = column < to.rows && first + i < to.columns;
    v.v[i] = arch::from_float<T>(inside ? from[source_row(column, to.half) * to.columns + first + i] : 0.0f);
  }
  v.store(reinterpret_cast<T*>(packed + piece));
}

// Vectors and tables, row by row.
__global__ void pack_rows(const PackedSource to, const float* from, float* packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= to.rows * to.columns) return;
  const int64_t row = i / to.columns, column = i % to.columns;
  packed[row * to.stride + column] = from[to.half == 0 ? i : source_row(column, to.half)];
}

}  // namespace

int pack_source(const PackedSource& to, const float* from, float* packed, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto blocks = [](int64_t n) { return dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads)); };
  const bool bf16 = to.form == PackedSource::Form::fragments_bf16;
  if (to.form == PackedSource::Form::rows)
    return arch::launch(&pack_rows, blocks(to.rows * to.columns), dim3(kThreads), 0, on, to, from, packed + to.at);
  const int64_t depth = kFragmentBytes / (bf16 ? 2 : 4);
  const int64_t pieces = to.stride / kFragmentColumns * ((to.columns + depth - 1) / depth) * 32;
  uint4* const at = reinterpret_cast<uint4*>(packed + to.at);
  return bf16 ? arch::launch(&pack_fragments<arch::bf16>, blocks(pieces), dim3(kThreads), 0, on, to, from, at, pieces)
              : arch::launch(&pack_fragments<float>, blocks(pieces), dim3(kThreads), 0, on, to, from, at, pieces);
}

}  // namespace biflow::cuda
