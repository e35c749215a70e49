// Products x W^T + bias with packed weights (layout in block.h), fp32: column panels that are read once, front to back,
// for up to kTileRows rows at a time.
//
// Every output is summed in the same order whatever the tile it is computed in: blocks of kSumBlock products, in order
// of k, then the blocks in order. So a row's result does not depend on the rows beside it, and long sums stay accurate.
#pragma once

#include <type_traits>

#include "block.h"
#include "cpu/simd.h"

namespace biflow::cpu::BIFLOW_ISA {

constexpr int kTileRows = 6;  // 6 rows x 4 vectors of sums fill the 32 AVX-512 registers; 6 x 2 the 16 of AVX2 and SSE
constexpr int kSumBlock = 128;

// vectors of columns that a tile of `rows` rows holds sums for: few rows take more, to keep enough sums in flight
constexpr int tile_vectors(int rows) { return kLanes == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

// ahead: what lies so many floats behind a weight is fetched, 0: nothing
template <int Rows, int Vectors>
__attribute__((always_inline)) inline void add_products(vfloat (&sum)[Rows][Vectors], const float* x, int64_t x_stride,
                                                        const float* weight, int panel, int count, int64_t ahead) {
  for (int k = 0; k < count; ++k, weight += panel) {
    vfloat w[Vectors];
    if (ahead)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) __builtin_prefetch(weight + ahead + j * kLanes, 0, 2);
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

template <int Rows, int Vectors>
void linear_tile(const float* weight, const float* bias, int panel, int in, const float* x, int64_t x_stride,
                 float* out, int64_t ahead) {  // bias: null for none
  vfloat total[Rows][Vectors] = {};
  add_products(total, x, x_stride, weight, panel, in < kSumBlock ? in : kSumBlock, ahead);
  for (int k = kSumBlock; k < in; k += kSumBlock) {
    vfloat sum[Rows][Vectors] = {};
    const int count = in - k < kSumBlock ? in - k : kSumBlock;
    add_products(sum, x + k, x_stride, weight + static_cast<int64_t>(k) * panel, panel, count, ahead);
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < Vectors; ++j) total[r][j] += sum[r][j];
  }
  for (int r = 0; r < Rows; ++r)
    for (int j = 0; j < Vectors; ++j) {
      const int c = j * kLanes;
      store(out + r * kPanelColumns + c, bias ? total[r][j] + load(bias + c) : total[r][j]);
    }
}

// Rows rows by `columns` columns, a multiple of kColumnGroup, of a panel of `panel` columns -> out
// [Rows][kPanelColumns]
template <int Rows>
void linear_rows(const float* weight, const float* bias, int panel, int columns, int in, const float* x,
                 int64_t x_stride, float* out, int64_t ahead = 0) {
  constexpr int kWide = tile_vectors(Rows), kNarrow = kColumnGroup / kLanes > 2 ? 2 : kColumnGroup / kLanes;
  const auto bias_at = [bias](int c) { return bias ? bias + c : nullptr; };
  int c = 0;
  for (; c + kWide * kLanes <= columns; c += kWide * kLanes)
    linear_tile<Rows, kWide>(weight + c, bias_at(c), panel, in, x, x_stride, out + c, ahead);
  if constexpr (kWide == 4 * kNarrow)
    for (; c + 2 * kNarrow * kLanes <= columns; c += 2 * kNarrow * kLanes)
      linear_tile<Rows, 2 * kNarrow>(weight + c, bias_at(c), panel, in, x, x_stride, out + c, ahead);
  for (; c < columns; c += kNarrow * kLanes)
    linear_tile<Rows, kNarrow>(weight + c, bias_at(c), panel, in, x, x_stride, out + c, ahead);
}

struct Fp32 {
  using Value = float;  // of activations
  static constexpr bool kPairs = false;

  struct Session {  // of a thread that multiplies
    void rows(int) {}
  };

  // The columns [first, last), multiples of kColumnGroup, of x (rows, in) W^T + bias, tile by tile:
  // sink(row, rows, column, columns, values, stride) gets `columns` values for each row, a multiple of kColumnGroup.
  // Of the inputs [begin, end) alone, where they are given; the first of them bring the bias.
  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, const float* x, int64_t x_stride, int rows,
                      int first, int last, Sink&& sink) {
    product(packed, at, 0, at.in, x, x_stride, rows, first, last, sink);
  }
  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, int begin, int end, const float* x, int64_t x_stride,
                      int rows, int first, int last, Sink&& sink) {
    alignas(64) float values[kTileRows * kPanelColumns];
    for (int c = first, next; c < last; c = next) {
      const int left = c / kPanelColumns * kPanelColumns;
      const int panel = at.columns - left < kPanelColumns ? at.columns - left : kPanelColumns;
      next = left + panel < last ? left + panel : last;
      const float* weight =
          packed + at.weight + static_cast<int64_t>(left) * at.in + static_cast<int64_t>(begin) * panel + (c - left);
      const float* bias = begin == 0 ? packed + at.bias + c : nullptr;
      const int64_t ahead = static_cast<int64_t>(panel) * at.in;  // the next panel, while this one meets many rows
      for (int r = 0, count; r < rows; r += count) {
        count = rows - r < kTileRows ? rows - r : kTileRows;
        const float* xr = x + r * x_stride + begin;
        const auto multiply = [&](auto tile_rows, int64_t fetched) {
          linear_rows<decltype(tile_rows)::value>(weight, bias, panel, next - c, end - begin, xr, x_stride, values,
                                                  fetched);
        };
        switch (count) {
          case 1:
            multiply(std::integral_constant<int, 1>(), 0);
            break;
          case 2:
            multiply(std::integral_constant<int, 2>(), 0);
            break;
          case 3:
            multiply(std::integral_constant<int, 3>(), 0);
            break;
          case 4:
            multiply(std::integral_constant<int, 4>(), 0);
            break;
          case 5:
            multiply(std::integral_constant<int, 5>(), 0);
            break;
          default:
            multiply(std::integral_constant<int, kTileRows>(), r == 0 ? ahead : 0);
        }
        sink(r, count, c, next - c, values, kPanelColumns);
      }
    }
  }
};

}  // namespace biflow::cpu::BIFLOW_ISA
