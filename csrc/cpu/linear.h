// out = x W^T + bias for packed weights (layout in decode_block.h): column panels that are read once, front to back,
// for up to kTileRows rows at a time.
//
// Every output is summed in the same order whatever the tile it is computed in: blocks of kSumBlock products, in order
// of k, then the blocks in order. So a row's result does not depend on the rows beside it, and long sums stay accurate.
#pragma once

#include "cpu/simd.h"
#include "decode_block.h"

namespace biflow::cpu::BIFLOW_ISA {

constexpr int kTileRows = 6;  // 6 rows x 4 vectors of sums fill the 32 AVX-512 registers; 6 x 2 the 16 of AVX2 and SSE
constexpr int kSumBlock = 128;

// vectors of columns that a tile of `rows` rows holds sums for: few rows take more, to keep enough sums in flight
constexpr int tile_vectors(int rows) { return kLanes == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

enum class Write { set, add };

template <int Rows, int Vectors>
__attribute__((always_inline)) inline void add_products(vfloat (&sum)[Rows][Vectors], const float* x, int64_t x_stride,
                                                        const float* weight, int panel, int count) {
  for (int k = 0; k < count; ++k, weight += panel) {
    vfloat w[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const vfloat xk = broadcast(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sum[r][j] += xk * w[j];
    }
  }
}

template <Write write, int Rows, int Vectors>
void linear_tile(const float* weight, const float* bias, int panel, int in, const float* x, int64_t x_stride,
                 float* out, int64_t out_stride) {
  vfloat total[Rows][Vectors] = {};
  add_products(total, x, x_stride, weight, panel, in < kSumBlock ? in : kSumBlock);
  for (int k = kSumBlock; k < in; k += kSumBlock) {
    vfloat sum[Rows][Vectors] = {};
    const int count = in - k < kSumBlock ? in - k : kSumBlock;
    add_products(sum, x + k, x_stride, weight + static_cast<int64_t>(k) * panel, panel, count);
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < Vectors; ++j) total[r][j] += sum[r][j];
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j) {
      float* o = out + r * out_stride + j * kLanes;
      const vfloat y = total[r][j] + load(bias + j * kLanes);
      store(o, write == Write::add ? load(o) + y : y);
    }
}

// Rows rows of one panel of `panel` columns
template <Write write, int Rows>
void linear_rows(const float* weight, const float* bias, int panel, int in, const float* x, int64_t x_stride,
                 float* out, int64_t out_stride) {
  constexpr int kWide = tile_vectors(Rows), kNarrow = kColumnGroup / kLanes > 2 ? 2 : kColumnGroup / kLanes;
  int c = 0;
  for (; c + kWide * kLanes <= panel; c += kWide * kLanes)
    linear_tile<write, Rows, kWide>(weight + c, bias + c, panel, in, x, x_stride, out + c, out_stride);
  for (; c < panel; c += kNarrow * kLanes)
    linear_tile<write, Rows, kNarrow>(weight + c, bias + c, panel, in, x, x_stride, out + c, out_stride);
}

// x (rows, in) -> out (rows, padded_columns(linear.out)): set or added to. The padding columns come out as 0 (or
// unchanged).
template <Write write>
void linear(const float* packed, const PackedLinear& at, const float* x, int64_t x_stride, float* out,
            int64_t out_stride, int rows) {
  const float* bias = packed + at.bias;
  const int columns = padded_columns(at.out);
  for (int c = 0; c < columns; c += kPanelColumns) {
    const int panel = columns - c < kPanelColumns ? columns - c : kPanelColumns;
    const float* weight = packed + at.weight + static_cast<int64_t>(c) * at.in;
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      linear_rows<write, kTileRows>(weight, bias + c, panel, at.in, x + r * x_stride, x_stride,
                                    out + r * out_stride + c, out_stride);
    const float* xr = x + r * x_stride;
    float* o = out + r * out_stride + c;
    switch (rows - r) {
      case 1:
        linear_rows<write, 1>(weight, bias + c, panel, at.in, xr, x_stride, o, out_stride);
        break;
      case 2:
        linear_rows<write, 2>(weight, bias + c, panel, at.in, xr, x_stride, o, out_stride);
        break;
      case 3:
        linear_rows<write, 3>(weight, bias + c, panel, at.in, xr, x_stride, o, out_stride);
        break;
      case 4:
        linear_rows<write, 4>(weight, bias + c, panel, at.in, xr, x_stride, o, out_stride);
        break;
      case 5:
        linear_rows<write, 5>(weight, bias + c, panel, at.in, xr, x_stride, o, out_stride);
        break;
    }
  }
}

}  // namespace biflow::cpu::BIFLOW_ISA
