// The products of decode_block. A block owns columns of a row group of up to 64 sequences. Its warps divide the inputs,
// so that every weight and every activation is used by one warp; their sums meet in shared memory and are added in the
// order of the warps. With bf16 weights they run on tensor cores, with fp32 weights as fused multiply-adds.
#pragma once

#include <type_traits>

#include "cuda/decode_block_norm.cuh"
#include "cuda/decode_block_state.cuh"
#include "cuda/decode_block_tokens.cuh"
#include "cuda/decode_block_weights.cuh"

namespace biflow::cuda {

// Act: of weights, of what they multiply: float or bf16. Lane 4 g + t of a warp.
template <class Act, int kRowTiles>
class StepProducts {
  static constexpr bool kBf16 = sizeof(Act) == 2;
  static constexpr int kRows = kRowTile * kRowTiles;
  static constexpr int kChunk = 4 / kRowTiles;  // blocks of inputs whose activations are loaded together

 public:
  BIFLOW_DEVICE StepProducts(const DecodeState& s, unsigned char* shared)
      : s_(s),
        row_group_(static_cast<int>(blockIdx.x) % s.row_groups),
        owner_(static_cast<int>(blockIdx.x) / s.row_groups < s.owners ? static_cast<int>(blockIdx.x) / s.row_groups
                                                                      : -1),
        warp_(threadIdx.x / 32),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        weights_(s, reinterpret_cast<uint4*>(shared), owner_) {
    const DecodeShared part = decode_shared(s.plan, kBf16, s.width, s.channels);
    sums_ = reinterpret_cast<float*>(shared + part.ring);
    rows_ = reinterpret_cast<float4*>(shared + part.ring + part.sums);
    statistics_ = reinterpret_cast<float2*>(shared + part.ring + part.sums + part.rows);
  }

  BIFLOW_DEVICE WeightStream<Act, kRowTiles>& weights() { return weights_; }
  BIFLOW_DEVICE float* sums() { return sums_; }  // free between two products

  BIFLOW_DEVICE void run(const DecodePlace& at) {
    if constexpr (kBf16) {
      if (!is_fp32_product(at.phase)) return product<true>(at);
    }
    product<false>(at);
  }

 private:
  BIFLOW_DEVICE static constexpr int tiles(bool tensor) { return tiles_at_once<kRowTiles>(tensor); }

  BIFLOW_DEVICE int rows_here() const {
    const int left = s_.rows - row_group_ * kRows;
    return left < kRows ? left : kRows;
  }
  BIFLOW_DEVICE int64_t row_offset(int row) const {
    return static_cast<int64_t>(row_group_ * kRows + row) * s_.x_stride;
  }

  // The activations of this block's rows in a phase, as they lie in memory; null: the splits of attention have to be
  // joined.
  struct Source {
    const unsigned char* rows;
    uint32_t stride;  // bytes
  };
  template <class T>
  BIFLOW_DEVICE Source source(const DecodePlace& at) const {
    const void* from = s_.y;
    int stride = s_.x_stride;
    if (at.phase == DecodePhase::proj) from = s_.o;
    if (at.phase == DecodePhase::fc2) from = s_.h, stride = s_.h_stride;
    if (at.phase == DecodePhase::head) from = s_.x;
    if (at.phase == DecodePhase::proj && s_.plan.splits > 1) return {nullptr, 0};
    return {reinterpret_cast<const unsigned char*>(static_cast<const T*>(from) +
                                                   static_cast<int64_t>(row_group_ * kRows) * stride),
            static_cast<uint32_t>(stride) * static_cast<uint32_t>(sizeof(T))};
  }

  // 16 bytes of a row: inputs from `c` on; zeros where there is no such row or, if not `inside`, no such block. One
  // load without branches: many of them are to be under way at once.
  template <class T>
  BIFLOW_DEVICE float4 activations(const Source& from, int row, int c, bool inside) const {
    const bool read = inside && row < rows_here();
    const uint32_t at = read ? row * from.stride + c * static_cast<uint32_t>(sizeof(T)) : 0;
    const float4 x = __ldcg(reinterpret_cast<const float4*>(from.rows + at));
    return read ? x : float4{0, 0, 0, 0};
  }

  // The result of attention from those of the splits.
  template <class T>
  BIFLOW_DEVICE float4 joined_splits(int local_row, int c, bool inside) const {
    constexpr int n = 16 / sizeof(T);
    float v[n] = {}, total = 0, top = -INFINITY;
    if (!inside || local_row >= rows_here() || c >= s_.width) return {0, 0, 0, 0};
    const int64_t row = row_group_ * kRows + local_row;
    const int head = c / s_.head_dim;  // of all n: head_dim is a multiple of 8
    const auto weight_of = [&](int split) {
      return __ldcg(s_.lse + (static_cast<int64_t>(split) * s_.rows + row) * s_.heads + head);
    };
    for (int split = 0; split < s_.plan.splits; ++split) top = fmaxf(top, weight_of(split));
    for (int split = 0; split < s_.plan.splits; ++split) {
      const float weight = arch::exp2_fast(weight_of(split) - top);
      const float* const from = s_.partial + (static_cast<int64_t>(split) * s_.rows + row) * s_.x_stride + c;
#pragma unroll
      for (int i = 0; i < n; i += 4) {
        float four[4];
        load4(four, from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] += weight * four[j];
      }
      total += weight;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] /= total;
    return packed(v);
  }

  // The embedding's input into rows_, [block][row][16]: the token that goes in, which one block writes to the output.
  BIFLOW_DEVICE void load_tokens(const DecodePlace& at, const DecodeLinear& linear) {
    const int size = linear.blocks * kRows * 16;
    for (int i = threadIdx.x; i < size; i += kDecodeThreads) {
      const int row = i / 16 % kRows, d = i / (16 * kRows) * 16 + i % 16;
      float v = 0;
      if (row < rows_here() && d < s_.channels)
        v = StepTokens(s_).input(at.step, row_group_ * kRows + row, d, owner_ == 0);
      reinterpret_cast<float*>(rows_)[i] = v;
    }
    __syncthreads();
  }

  template <bool kTensor>
  BIFLOW_DEVICE void product(const DecodePlace& at) {
    constexpr int kTiles = tiles(kTensor);
    const DecodeLinear linear = linear_of<Act>(s_, at);
    if (owner_ < 0 || owner_ >= linear.tiles) return;
    const bool normalized = at.phase == DecodePhase::qkv || at.phase == DecodePhase::fc1;
    const bool whole = s_.plan.norm_in_place && normalized;
    if (whole) normalize_rows(at, linear);
    if (at.phase == DecodePhase::embed) load_tokens(at, linear);
    for (int first = owner_; first < linear.tiles; first += kTiles * s_.owners) {
      float2 more[results(kTensor)];
#pragma unroll
      for (int i = 0; i < results(kTensor); ++i) more[i] = what_comes_to(at, linear, result(linear, first, i));
      if (first != owner_) __syncthreads();  // the sums before are read
      multiply(std::integral_constant<bool, kTensor>(), at, linear, first, whole);
      __syncthreads();
      const int warps = linear.blocks < kDecodeWarps ? linear.blocks : kDecodeWarps;
#pragma unroll
      for (int i = 0; i < results(kTensor); ++i) {
        const Result r = result(linear, first, i);
        if (r.row < 0) continue;
        float2 v = more[i];
        for (int warp = 0; warp < warps; ++warp) {
          const float2 part = *reinterpret_cast<const float2*>(
              sums_ + sum_place<kTensor>(warp, 2 * (threadIdx.x + i * kDecodeThreads)));
          v.x += part.x, v.y += part.y;
        }
        store(at, r, v);
      }
    }
  }

  // Sums of a warp: [tile][row][8].
  template <bool kTensor>
  BIFLOW_DEVICE static int sum_place(int warp, int place) {
    return warp * tiles(kTensor) * kRows * kFragmentColumns + place;
  }

  // Two neighbouring results, which one thread adds up.
  struct Result {
    int row, column;  // row of all; negative: none
  };
  BIFLOW_DEVICE static constexpr int results(bool tensor) { return tensor ? tiles(true) * kRowTiles / 4 : 1; }
  // The i-th of this thread.
  BIFLOW_DEVICE Result result(const DecodeLinear& linear, int first, int i) const {
    const int pair = static_cast<int>(threadIdx.x) + i * kDecodeThreads, row = pair / 4 % kRows;
    const int tile = first + pair / (4 * kRows) * s_.owners;
    const bool exists = row < rows_here() && tile < linear.tiles;
    return {exists ? row_group_ * kRows + row : -1, tile * kFragmentColumns + pair % 4 * 2};
  }

  // What a phase adds, loaded before the product: it was written at least one phase ago.
  BIFLOW_DEVICE float2 what_comes_to(const DecodePlace& at, const DecodeLinear& linear, const Result& f) const {
    if (f.row < 0) return {0, 0};
    float2 sum = __ldg(reinterpret_cast<const float2*>(linear.bias + f.column));
    const auto add = [&sum](float2 v) { sum.x += v.x, sum.y += v.y; };
    if (at.phase == DecodePhase::proj || at.phase == DecodePhase::fc2) {
      add(__ldcg(reinterpret_cast<const float2*>(s_.x + static_cast<int64_t>(f.row) * s_.x_stride + f.column)));
    } else if (at.phase == DecodePhase::embed) {
      const int64_t token = s_.data_index(s_.evaluated(at.step));
      if (s_.pos_embed)
        add(__ldg(reinterpret_cast<const float2*>(s_.weights + s_.packed.pos_embed + token * s_.x_stride + f.column)));
      const bool unconditional = f.row >= s_.batch;
      const float* const added = unconditional ? s_.condition.null_added : s_.condition.added;
      const int64_t b = unconditional ? f.row - s_.batch : f.row;
      if (added != nullptr && f.column < s_.width)
        add(__ldg(reinterpret_cast<const float2*>(added + b * s_.width + f.column)));
    }
    return sum;
  }

  BIFLOW_DEVICE void store(const DecodePlace& at, const Result& f, float2 v) const {
    const int64_t row = f.row;
    const auto put = [&](float* to) { arch::Vector<float, 2>{{v.x, v.y}}.store(to); };
    switch (at.phase) {
      case DecodePhase::qkv:
        return put(s_.qkv + row * s_.qkv_stride + f.column);
      case DecodePhase::fc1: {
        Act* const h = static_cast<Act*>(s_.h) + row * s_.h_stride;
        if (s_.swiglu) {
          arch::Vector<Act, 1>{{arch::from_float<Act>(v.x / (1 + expf(-v.x)) * v.y)}}.store(h + f.column / 2);
        } else {
          arch::Vector<Act, 2>{{arch::from_float<Act>(gelu(v.x)), arch::from_float<Act>(gelu(v.y))}}.store(h +
                                                                                                           f.column);
        }
        return;
      }
      case DecodePhase::head:
        return put(s_.raw + row * s_.raw_stride + f.column);
      default:
        return put(s_.x + row * s_.x_stride + f.column);
    }
  }

  BIFLOW_DEVICE static float gelu(float v) { return 0.5f * v * (1 + erff(v * 0.7071067811865476f)); }

  // This warp's sums of a few column tiles, on tensor cores.
  BIFLOW_DEVICE void multiply(std::true_type, const DecodePlace& at, const DecodeLinear& linear, int first,
                              bool whole) {
    constexpr int kTiles = tiles(true);
    float sum[kTiles][kRowTiles][4] = {};
    const Source from = source<Act>(at);
    for (int base = warp_; base < linear.blocks; base += kChunk * kDecodeWarps) {
      float4 x[kChunk][kRowTiles][2];
      const auto load = [&](auto&& piece) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int block = base + c * kDecodeWarps;
              x[c][m][half] = piece(block, kRowTile * m + 8 * half + g_, half, block < linear.blocks);
            }
      };
      if (whole)
        load([&](int block, int, int half, bool inside) {
          return inside ? raw_place(block / kDecodeWarps, half, 0) : float4{0, 0, 0, 0};
        });
      else if (from.rows == nullptr)
        load(
            [&](int block, int row, int, bool inside) { return joined_splits<Act>(row, block * 32 + t_ * 8, inside); });
      else
        load([&](int block, int row, int, bool inside) {
          return activations<Act>(from, row, block * 32 + t_ * 8, inside);
        });
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (base + c * kDecodeWarps >= linear.blocks) break;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (first + j * s_.owners >= linear.tiles) break;
          const uint4 w = weights_.next();
          const uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            uint32_t top[4], bottom[4];
            memcpy(top, &x[c][m][0], 16);
            memcpy(bottom, &x[c][m][1], 16);
            const uint32_t a[4] = {top[0], bottom[0], top[1], bottom[1]}, b[4] = {top[2], bottom[2], top[3], bottom[3]};
            arch::mma_m16n8k16<arch::bf16>(sum[j][m], a, low, sum[j][m]);
            arch::mma_m16n8k16<arch::bf16>(sum[j][m], b, high, sum[j][m]);
          }
        }
      }
    }
    if (warp_ >= linear.blocks) return;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int place = (j * kRows + kRowTile * m + 8 * half + g_) * kFragmentColumns + 2 * t_;
          arch::Vector<float, 2>{{sum[j][m][2 * half], sum[j][m][2 * half + 1]}}.store(sums_ +
                                                                                       sum_place<true>(warp_, place));
        }
  }

  // The same as fused multiply-adds: lane 4 g + t multiplies column g with the inputs 4 t to 4 t + 3 of each block.
  BIFLOW_DEVICE void multiply(std::false_type, const DecodePlace& at, const DecodeLinear& linear, int first,
                              bool whole) {
    constexpr int kTiles = tiles(false);
    float sum[kTiles][kRows] = {};
    const bool tokens = at.phase == DecodePhase::embed;
    for (int base = warp_; base < linear.blocks; base += kChunk * kDecodeWarps) {
      float4* const own = warp_rows() + (whole ? base / kDecodeWarps * 4 * kRowTile : 0);  // [block][row][4]
      if (!whole && !tokens) load_rows(at, linear, base, own);
#pragma unroll 1
      for (int c = 0; c < kChunk && base + c * kDecodeWarps < linear.blocks; ++c) {
        const float4* const rows = tokens ? rows_ + (base + c * kDecodeWarps) * 4 * kRows : own + c * 4 * kRows;
        uint4 w[kTiles] = {};
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (first + j * s_.owners < linear.tiles) w[j] = weights_.next();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows_here()) break;
          const float4 x = rows[4 * r + t_];
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            sum[j][r] += __uint_as_float(w[j].x) * x.x + __uint_as_float(w[j].y) * x.y + __uint_as_float(w[j].z) * x.z +
                         __uint_as_float(w[j].w) * x.w;
        }
      }
    }
    if (warp_ >= linear.blocks) return;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int r = 0; r < kRows; r += 4)  // over the four lanes of a column; lane t keeps row r + t
        sums_[sum_place<false>(warp_, (j * kRows + r + t_) * kFragmentColumns + g_)] =
            transposed_sum(sum[j][r], sum[j][r + 1], sum[j][r + 2], sum[j][r + 3]);
  }

  // Lane t of a quad gets the quad's sum of its t-th argument.
  BIFLOW_DEVICE float transposed_sum(float a, float b, float c, float d) const {
    const bool odd = t_ & 1, high = t_ & 2;
    const float ab = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    const float cd = (odd ? d : c) + __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
    return (high ? cd : ab) + __shfl_xor_sync(0xffffffffu, high ? ab : cd, 2);
  }

  // The activations of this warp's next kChunk blocks of 16 inputs, [block][row][4].
  BIFLOW_DEVICE void load_rows(const DecodePlace& at, const DecodeLinear& linear, int base, float4* rows) const {
    __syncwarp();  // the rows before are read
    float4 x[2 * 4];
    const Source from = source<float>(at);
    const auto load = [&](auto&& piece) {
#pragma unroll
      for (int i = 0; i < 2 * 4; ++i) {
        const int c = i / (2 * kRowTiles), row = i % (2 * kRowTiles) * 8 + g_, block = base + c * kDecodeWarps;
        x[i] = piece(row, block * 16 + t_ * 4, block < linear.blocks);
      }
    };
    if (from.rows == nullptr)
      load([&](int row, int c, bool inside) { return joined_splits<float>(row, c, inside); });
    else
      load([&](int row, int c, bool inside) { return activations<float>(from, row, c, inside); });
#pragma unroll
    for (int i = 0; i < 2 * 4; ++i) {
      const int c = i / (2 * kRowTiles), row = i % (2 * kRowTiles) * 8 + g_;
      rows[(c * kRows + row) * 4 + t_] = x[i];
    }
    __syncwarp();
  }

  // --- rows that are normalised in place

  // In place: this block's rows, as its products read them, into rows_. Blocks of inputs and lanes as in a product.
  BIFLOW_DEVICE void normalize_rows(const DecodePlace& at, const DecodeLinear& linear) {
    constexpr int kInputs = 16 / sizeof(Act), kDepth = 4 * kInputs;  // of a lane, of a block
    const RowNorm norm(s_, at.layer, at.phase == DecodePhase::qkv);
    Moments m[2];
    for (int block = warp_, i = 0; block < linear.blocks; block += kDecodeWarps, ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 8 * half + g_, c = block * kDepth + t_ * kInputs;
        float v[kInputs];
#pragma unroll
        for (int k = 0; k < kInputs / 4; ++k) {
          float4 x = {0, 0, 0, 0};
          if (row < rows_here()) x = __ldcg(reinterpret_cast<const float4*>(s_.x + row_offset(row) + c) + k);
          raw_place(i, half, k) = x;
          v[4 * k] = x.x, v[4 * k + 1] = x.y, v[4 * k + 2] = x.z, v[4 * k + 3] = x.w;
        }
        m[half] = norm.joined(m[half], norm.moments(v, c));
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = norm.over_lanes(m[half], 1, 4);
      const float2 own = {m[half].mean, m[half].squares};
      if (t_ == 0) statistics_[(8 * half + g_) * kDecodeWarps + warp_] = own;
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = {};
      for (int other = 0; other < kDecodeWarps; ++other) {
        const float2 two = statistics_[(8 * half + g_) * kDecodeWarps + other];
        m[half] = norm.joined(m[half], {static_cast<float>(channels_of(other, linear.blocks, kDepth)), two.x, two.y});
      }
    }
    for (int block = warp_, i = 0; block < linear.blocks; block += kDecodeWarps, ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[kInputs];
#pragma unroll
        for (int k = 0; k < kInputs / 4; ++k) {
          const float4 x = raw_place(i, half, k);
          v[4 * k] = x.x, v[4 * k + 1] = x.y, v[4 * k + 2] = x.z, v[4 * k + 3] = x.w;
        }
        norm.apply(v, block * kDepth + t_ * kInputs, m[half]);
        const float4 row = packed(v);
        raw_place(i, half, 0) = row;
      }
    __syncwarp();  // fused multiply-adds read other lanes' rows
  }

  // Channels of the blocks that a warp has.
  BIFLOW_DEVICE int channels_of(int warp, int blocks, int depth) const {
    const int count = warp < blocks ? (blocks - warp + kDecodeWarps - 1) / kDecodeWarps : 0;
    const bool has_last = count > 0 && (blocks - 1 - warp) % kDecodeWarps == 0;
    return count * depth - (has_last ? blocks * depth - s_.width : 0);
  }

  // The k-th four channels of a lane's rows g and g + 8 of the warp's i-th block. Those of k = 0 hold the normalised
  // row afterwards; with fp32 they lie as [block][row][16].
  BIFLOW_DEVICE float4& raw_place(int i, int half, int k) const {
    constexpr int kFours = 4 / sizeof(Act);
    return warp_rows()[((i * 2 + half) * kFours + k) * 32 + threadIdx.x % 32];
  }
  BIFLOW_DEVICE float4* warp_rows() const {
    const int unit = kDecodeWarps * kFragmentBytes / static_cast<int>(sizeof(Act));
    const int blocks = s_.plan.norm_in_place ? (s_.width + unit - 1) / unit : 0;
    const int whole = blocks * 2 * (4 / static_cast<int>(sizeof(Act))) * 32, least = 4 * kRowTile * 4;
    return rows_ + warp_ * (whole > least ? whole : least);
  }

  BIFLOW_DEVICE static float4 packed(const float (&v)[4]) { return {v[0], v[1], v[2], v[3]}; }
  BIFLOW_DEVICE static float4 packed(const float (&v)[8]) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = arch::pack<arch::bf16>(v[2 * i], v[2 * i + 1]);
    float4 x;
    memcpy(&x, pair, 16);
    return x;
  }

  const DecodeState& s_;
  const int row_group_, owner_, warp_, g_, t_;
  WeightStream<Act, kRowTiles> weights_;
  float* sums_;
  float4* rows_;
  float2* statistics_;  // [16 rows][warp]: mean, squares
};

}  // namespace biflow::cuda
