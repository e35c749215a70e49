// Products x W^T + bias of bf16 activations with packed bf16 weights (tiles of 16 columns, layout in block.h), summed
// in fp32. AMX where the instruction set has it, for one row as for many: the sums run over k in the same order, so a
// row's result does not depend on the rows beside it. Elsewhere both are widened to fp32.
#pragma once

#include "block.h"
#include "cpu/convert.h"

namespace biflow::cpu::BIFLOW_ISA {

#ifdef __AMX_BF16__

// The intrinsics that load tiles and their configuration do not tell the compiler what memory they read: what was
// written for them must be there before.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

struct Bf16 {
  using Value = bf16;
  static constexpr bool kPairs = true;
  static constexpr int kRows = 16;  // of a tile
  // Tiles (the intrinsics take digits only): 0 to 3 sums, 4 and 5 rows of x, 6 and 7 weights.

  // Configures the tiles of the calling thread and gives it back the configuration it had.
  class Session {
   public:
    Session() {
      _tile_storeconfig(&before_);
      finish_stores();
    }
    ~Session() {
      finish_stores();
      _tile_loadconfig(&before_);
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void rows(int n) {  // of the products to come: one row costs less than sixteen
      const int height = n < kRows ? n : kRows;
      if (height == height_) return;
      height_ = height;
      Config c = {};
      c.palette = 1;
      for (int i = 0; i < 8; ++i) {
        c.row_bytes[i] = 64;
        c.rows[i] = static_cast<uint8_t>(i >= 6 ? kRows : height);
      }
      finish_stores();
      _tile_loadconfig(&c);
    }

   private:
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    Config before_;
    int height_ = 0;
  };

  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, const bf16* x, int64_t x_stride, int rows, int first,
                      int last, Sink&& sink) {
    product(packed, at, 0, at.in, x, x_stride, rows, first, last, sink);
  }
  // begin: a multiple of kTileDepth, and end too, or all there are
  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, int begin, int end, const bf16* x, int64_t x_stride,
                      int rows, int first, int last, Sink&& sink) {
    alignas(64) static const float kNoBias[kColumnGroup] = {};
    const int64_t words = round_up(at.in, kTileDepth) / 2 * kColumnGroup;  // of a tile's columns
    const int64_t row_bytes = x_stride * 2, steps = round_up(end - begin, kTileDepth) / kTileDepth;
    const float* weights = packed + at.weight + begin / 2 * kColumnGroup;
    const float* biases = packed + at.bias;
    const auto bias_at = [&](int c) { return begin == 0 ? biases + c : kNoBias; };
    alignas(64) float values[2 * kRows * kTileColumns];
    x += begin;
    int c = first;
    finish_stores();
    if (rows <= kRows)  // one tile of rows by four of columns
      for (; c + 2 * kTileColumns <= last; c += 2 * kTileColumns) {
        const float* w = weights + c / kColumnGroup * words;
        constexpr int kStride = 2 * kTileColumns;
        _tile_loadd(0, bias_at(c), 0);
        _tile_loadd(1, bias_at(c + 16), 0);
        _tile_loadd(2, bias_at(c + 32), 0);
        _tile_loadd(3, bias_at(c + 48), 0);
        for (int64_t k = 0; k < steps; ++k, w += kStep) {
          _tile_loadd(4, x + k * kTileDepth, row_bytes);
          _tile_loadd(6, w, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, w + words, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(6, w + 2 * words, 64);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(7, w + 3 * words, 64);
          _tile_dpbf16ps(3, 4, 7);
        }
        _tile_stored(0, values, kStride * 4);
        _tile_stored(1, values + 16, kStride * 4);
        _tile_stored(2, values + 32, kStride * 4);
        _tile_stored(3, values + 48, kStride * 4);
        sink(0, rows, c, kStride, values, kStride);
      }
    const int blocks = (rows + 2 * kRows - 1) / (2 * kRows);
    for (; c < last; c += kTileColumns) {
      const float* weight = weights + c / kColumnGroup * words;
      for (int r = 0; r < rows; r += 2 * kRows) {
        const bool two = rows - r > kRows;
        const bf16 *x0 = x + r * x_stride, *x1 = x0 + kRows * x_stride;
        const float* w = weight;
        _tile_loadd(0, bias_at(c), 0);
        _tile_loadd(1, bias_at(c + kColumnGroup), 0);
        if (two) {
          _tile_loadd(2, bias_at(c), 0);
          _tile_loadd(3, bias_at(c + kColumnGroup), 0);
          for (int64_t k = 0; k < steps; ++k, w += kStep) {
            _tile_loadd(4, x0 + k * kTileDepth, row_bytes);
            _tile_loadd(6, w, 64);
            _tile_loadd(7, w + words, 64);
            fetch(w + 2 * words, r / (2 * kRows), blocks);
            _tile_loadd(5, x1 + k * kTileDepth, row_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
          _tile_stored(2, values + kRows * kTileColumns, kTileColumns * 4);
          _tile_stored(3, values + kRows * kTileColumns + kColumnGroup, kTileColumns * 4);
        } else {
          for (int64_t k = 0; k < steps; ++k, w += kStep) {
            _tile_loadd(4, x0 + k * kTileDepth, row_bytes);
            _tile_loadd(6, w, 64);
            _tile_loadd(7, w + words, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
          }
        }
        _tile_stored(0, values, kTileColumns * 4);
        _tile_stored(1, values + kColumnGroup, kTileColumns * 4);
        sink(r, rows - r < 2 * kRows ? rows - r : 2 * kRows, c, kTileColumns, values, kTileColumns);
      }
    }
  }

 private:
  // Two tiles of the next columns: the share of row block `block` of `blocks`, so that memory is read all the time.
  static void fetch(const float* w, int block, int blocks) {
    const int64_t lines = 2 * kStep / 16;
    for (int64_t i = lines * block / blocks; i < lines * (block + 1) / blocks; ++i)
      __builtin_prefetch(w + 16 * i, 0, 2);
  }

  static constexpr int64_t kStep = kTileDepth / 2 * kColumnGroup;  // words of a tile of weights
};

#else

struct Rounded {  // to bf16
  float value;
};

inline void store(Rounded* p, vfloat v) {
  const vuint u = reinterpret_cast<vuint>(v);
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
  store(&p->value, v == v ? reinterpret_cast<vfloat>(rounded) : v);
}
inline void store_partial(Rounded* p, vfloat v, int n) { store_partial_half(p, v, n); }

struct Bf16 {
  using Value = Rounded;
  static constexpr bool kPairs = true;

  struct Session {
    void rows(int) {}
  };

  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, const Rounded* x, int64_t x_stride, int rows,
                      int first, int last, Sink&& sink) {
    product(packed, at, 0, at.in, x, x_stride, rows, first, last, sink);
  }
  // begin: a multiple of kTileDepth, and end too, or all there are
  template <class Sink>
  static void product(const float* packed, const PackedLinear& at, int begin, int end, const Rounded* x,
                      int64_t x_stride, int rows, int first, int last, Sink&& sink) {
    constexpr int kGroups = kLanes == 16 ? 2 : 1;  // of columns in a tile: as many sums as there are registers
    constexpr int kHigh = kLanes == 4 ? 2 : 6;     // rows
    const int64_t words = round_up(at.in, kTileDepth) / 2 * kColumnGroup;
    alignas(64) float values[kHigh * kTileColumns];
    for (int c = first; c < last; c += kTileColumns)
      for (int r = 0, count; r < rows; r += count) {
        count = rows - r >= kHigh ? kHigh : rows - r >= 2 ? 2 : 1;
        const Rounded* xr = x + r * x_stride + begin;
        for (int i = 0; i < kTileColumns; i += kGroups * kColumnGroup) {
          const float* weight = packed + at.weight + (c + i) / kColumnGroup * words + begin / 2 * kColumnGroup;
          const float* bias = begin == 0 ? packed + at.bias + c + i : nullptr;
          if (count == kHigh)
            tile<kHigh, kGroups>(weight, words, bias, xr, x_stride, end - begin, values + i);
          else if (count == 2)
            tile<2, kGroups>(weight, words, bias, xr, x_stride, end - begin, values + i);
          else
            tile<1, kGroups>(weight, words, bias, xr, x_stride, end - begin, values + i);
        }
        sink(r, count, c, kTileColumns, values, kTileColumns);
      }
  }

 private:
  template <int Rows, int Groups>
  static void tile(const float* weight, int64_t words, const float* bias, const Rounded* x, int64_t x_stride, int in,
                   float* out) {
    constexpr int kVectors = kColumnGroup / kLanes;  // of a group
    vfloat sum[Rows][Groups * kVectors] = {};
    for (int k = 0; k < in; k += 2, weight += kColumnGroup) {  // x is padded with zeros
#pragma GCC unroll 16
      for (int j = 0; j < Groups * kVectors; ++j) {
        const vuint w = load_words(weight + j / kVectors * words + j % kVectors * kLanes);
        const vfloat even = low_half(w), odd = high_half(w);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          sum[r][j] += broadcast(x[r * x_stride + k].value) * even;
          sum[r][j] += broadcast(x[r * x_stride + k + 1].value) * odd;
        }
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < Groups * kVectors; ++j)
        store(out + r * kTileColumns + j * kLanes, bias ? sum[r][j] + load(bias + j * kLanes) : sum[r][j]);
  }
};

#endif

}  // namespace biflow::cpu::BIFLOW_ISA
