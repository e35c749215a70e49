// The products of decode_block. A block owns columns of a row group of up to 64 sequences. Its warps divide the inputs,
// so that every weight and every activation is used by one warp; their sums meet in shared memory and are added in the
// order of the warps. With bf16 weights they run on tensor cores, with fp32 weights as fused multiply-adds.
#pragma once

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
  // Blocks of inputs of a warp whose activations are loaded together; from global memory to tensor cores, twice as many
  // are under way.
  static constexpr int kChunk = kRowTiles == 1 ? 3 : kRowTiles == 2 ? 2 : 1, kChunkFp32 = 4 / kRowTiles;

 public:
  BIFLOW_DEVICE StepProducts(const DecodeState& s, unsigned char* shared)
      : s_(s),
        row_group_(static_cast<int>(blockIdx.x) % s.row_groups),
        owner_(static_cast<int>(blockIdx.x) / s.row_groups < s.owners ? static_cast<int>(blockIdx.x) / s.row_groups
                                                                      : -1),
        warp_(threadIdx.x / 32),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        rows_here_(s.rows - row_group_ * kRows < kRows ? s.rows - row_group_ * kRows : kRows),
        linears_(reinterpret_cast<DecodeLinear*>(shared)),
        weights_(s, linears_, ring_of(s, shared), owner_) {
    const DecodeShared part = decode_shared(s.plan, kBf16, s.width, s.layers, s.channels);
    sums_ = reinterpret_cast<float*>(shared + part.linears + part.ring);
    rows_ = reinterpret_cast<float4*>(shared + part.linears + part.ring + part.sums);
    for (int product = threadIdx.x; product < s.products(); product += kDecodeThreads)
      linears_[product] = linear_of<Act>(s, s.product_place(product));
    __syncthreads();
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
  BIFLOW_DEVICE static uint4* ring_of(const DecodeState& s, unsigned char* shared) {
    return reinterpret_cast<uint4*>(shared + decode_shared(s.plan, kBf16, s.width, s.layers, s.channels).linears);
  }
  BIFLOW_DEVICE static constexpr int tiles(bool tensor) { return tiles_at_once<kRowTiles>(tensor); }

  template <bool kTensor>
  BIFLOW_DEVICE void product(const DecodePlace& at) {
    constexpr int kTiles = tiles(kTensor);
    const DecodeLinear linear = linears_[s_.product_of(at)];
    if (owner_ < 0 || owner_ >= linear.tiles) return;
    bool staged = false;
    for (int first = owner_; first < linear.tiles; first += kTiles * s_.owners) {
      Terms more[results(kTensor)];  // on their way while others are computed
#pragma unroll
      for (int i = 0; i < results(kTensor); ++i) more[i] = what_comes_to(at, linear, result(linear, first, i));
      if (first == owner_)
        staged = stage<kTensor>(at, linear);
      else
        __syncthreads();  // the sums before are read
      const int count = tiles_of_group(linear, first, s_.owners, kTiles);
      multiply<kTensor>(at, linear, count, staged);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < results(kTensor); ++i) {
        const Result r = result(linear, first, i);
        if (r.row < 0) continue;
        float2 v = more[i].sum();
#pragma unroll
        for (int warp = 0; warp < kDecodeWarps; ++warp) {
          const float2 part = *reinterpret_cast<const float2*>(
              sums_ + sum_place<kTensor>(warp, 2 * (threadIdx.x + i * kDecodeThreads)));
          v.x += part.x, v.y += part.y;
        }
        store(at, r, v);
      }
    }
  }

  // --- what is multiplied

  // The activations of a product in global memory, of this block's rows.
  struct Source {
    const unsigned char* rows;
    uint32_t stride;  // bytes
  };
  BIFLOW_DEVICE Source source(const DecodePlace& at) const {
    const void* from = s_.y;
    int stride = s_.x_stride;
    if (at.phase == DecodePhase::proj) from = s_.o;
    if (at.phase == DecodePhase::fc2) from = s_.h, stride = s_.h_stride;
    if (at.phase == DecodePhase::head) from = s_.x;
    const uint32_t bytes = at.phase == DecodePhase::head ? 4 : sizeof(Act);
    return {static_cast<const unsigned char*>(from) + static_cast<int64_t>(row_group_ * kRows) * stride * bytes,
            static_cast<uint32_t>(stride) * bytes};
  }

  // Rows that do not exist are read from one that does: no result depends on another row.
  BIFLOW_DEVICE int existing(int row) const { return row < rows_here_ ? row : 0; }

  // Offsets of the rows 16 m + 8 half + g, at this lane's 16 bytes of a block of inputs.
  struct Lane {
    uint32_t at[kRowTiles][2];
  };
  BIFLOW_DEVICE Lane lane_of(const Source& from) const {
    Lane lane;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        lane.at[m][half] = existing(kRowTile * m + 8 * half + g_) * from.stride + 16 * t_;
    return lane;
  }
  // The piece of the c-th of the blocks that a warp has from `base` on: of an address that they share.
  BIFLOW_DEVICE static float4 piece(const Source& from, uint32_t lane, int base, int c) {
    const unsigned char* const first =
        from.rows + static_cast<size_t>(lane) + static_cast<size_t>(base) * kFragmentBytes;
    return __ldcg(reinterpret_cast<const float4*>(first + c * kDecodeWarps * kFragmentBytes));
  }

  // Some products find their rows in shared memory: what normalises them, joins or makes them has put them there, as
  // rows_[block of inputs][row][16 bytes]. Returns whether this is one; then all threads see the rows.
  template <bool kTensor>
  BIFLOW_DEVICE bool stage(const DecodePlace& at, const DecodeLinear& linear) {
    bool staged = false;
    if constexpr (!kTensor) {
      if (at.phase == DecodePhase::embed) stage_tokens(at, linear), staged = true;
    }
    if constexpr (kRowTiles == 1 && kTensor == kBf16) {  // products of layers
      const bool normed = at.phase == DecodePhase::qkv || at.phase == DecodePhase::fc1;
      if (normed && s_.plan.norm_in_place) stage_norm(at), staged = true;
      if (at.phase == DecodePhase::proj && s_.plan.splits > 1) stage_splits(linear), staged = true;
    }
    if (staged) __syncthreads();
    return staged;
  }
  BIFLOW_DEVICE float4& staged_piece(int block, int row, int piece) const {
    return rows_[(block * kRows + row) * 4 + piece];
  }

  // The embedding's input: the token that goes in, which one block writes to the output.
  BIFLOW_DEVICE void stage_tokens(const DecodePlace& at, const DecodeLinear& linear) {
    const int size = linear.blocks * kRows * 16;
    for (int i = threadIdx.x; i < size; i += kDecodeThreads) {
      const int row = i / 16 % kRows, d = i / (16 * kRows) * 16 + i % 16;
      float v = 0;
      if (row < rows_here_ && d < s_.channels)
        v = StepTokens(s_).input(at.step, row_group_ * kRows + row, d, owner_ == 0);
      reinterpret_cast<float*>(rows_)[i] = v;
    }
  }

  // This block's rows, normalised.
  BIFLOW_DEVICE void stage_norm(const DecodePlace& at) {
    constexpr int kPiece = 16 / sizeof(Act);  // channels
    const RowNorm norm(s_, at.layer, at.phase == DecodePhase::qkv);
    for (int row = warp_; row < rows_here_; row += kDecodeWarps)
      norm.apply(s_.x + static_cast<int64_t>(row_group_ * kRows + row) * s_.x_stride, [&](int c, const float (&v)[4]) {
        const int piece = c / kPiece;
        auto* const to = reinterpret_cast<unsigned char*>(&staged_piece(piece / 4, row, piece % 4));
        store4(reinterpret_cast<Act*>(to) + c % kPiece, v);
      });
  }

  // The results of attention from those of the splits.
  BIFLOW_DEVICE void stage_splits(const DecodeLinear& linear) {
    constexpr int n = 16 / sizeof(Act);
    for (int i = threadIdx.x; i < linear.blocks * 4 * rows_here_; i += kDecodeThreads) {
      const int local = i % rows_here_, piece = i / rows_here_, c = piece * n;
      float v[n] = {}, total = 0, top = -INFINITY;
      if (c < s_.width) {
        const int64_t row = row_group_ * kRows + local;
        const int head = c / s_.head_dim;  // of all n: head_dim is a multiple of 8
        const auto weight_of = [&](int split) {
          return __ldcg(s_.lse + (static_cast<int64_t>(split) * s_.rows + row) * s_.heads + head);
        };
        for (int split = 0; split < s_.plan.splits; ++split) top = fmaxf(top, weight_of(split));
        for (int split = 0; split < s_.plan.splits; ++split) {
          const float weight = arch::exp2_fast(weight_of(split) - top);
          const float* const from = s_.partial + (static_cast<int64_t>(split) * s_.rows + row) * s_.x_stride + c;
#pragma unroll
          for (int k = 0; k < n; k += 4) {
            float four[4];
            load4(four, from + k);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[k + j] += weight * four[j];
          }
          total += weight;
        }
        const float factor = 1 / total;
#pragma unroll
        for (int k = 0; k < n; ++k) v[k] *= factor;
      }
      staged_piece(piece / 4, local, piece % 4) = packed(v);
    }
  }

  // --- what becomes of the sums

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
    const bool exists = row < rows_here_ && tile < linear.tiles;
    return {exists ? row_group_ * kRows + row : -1, tile * kFragmentColumns + pair % 4 * 2};
  }

  // What a phase adds: written at least one phase ago, so it may be loaded before the product.
  struct Terms {
    float2 bias, more;

    BIFLOW_DEVICE float2 sum() const { return {bias.x + more.x, bias.y + more.y}; }
  };
  BIFLOW_DEVICE Terms what_comes_to(const DecodePlace& at, const DecodeLinear& linear, const Result& f) const {
    Terms terms = {};
    if (f.row < 0) return terms;
    terms.bias = __ldg(reinterpret_cast<const float2*>(linear.bias + f.column));
    if (at.phase == DecodePhase::proj || at.phase == DecodePhase::fc2) {
      terms.more = __ldcg(reinterpret_cast<const float2*>(s_.x + static_cast<int64_t>(f.row) * s_.x_stride + f.column));
    } else if (at.phase == DecodePhase::embed) {
      const int64_t token = s_.data_index(s_.evaluated(at.step));
      if (s_.pos_embed)
        terms.more =
            __ldg(reinterpret_cast<const float2*>(s_.weights + s_.packed.pos_embed + token * s_.x_stride + f.column));
      const bool unconditional = f.row >= s_.batch;
      const float* const added = unconditional ? s_.condition.null_added : s_.condition.added;
      const int64_t b = unconditional ? f.row - s_.batch : f.row;
      if (added != nullptr && f.column < s_.width) {
        const float2 v = __ldg(reinterpret_cast<const float2*>(added + b * s_.width + f.column));
        terms.more.x += v.x, terms.more.y += v.y;
      }
    }
    return terms;
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

  // --- the products of a warp: the sums of `count` column tiles over its blocks of inputs

  template <bool kTensor>
  BIFLOW_DEVICE void multiply(const DecodePlace& at, const DecodeLinear& linear, int count, bool staged) {
    if constexpr (!kTensor) {
      return staged ? multiply_fp32<true>(at, linear, count) : multiply_fp32<false>(at, linear, count);
    } else if constexpr (kRowTiles == 1) {
      return staged ? multiply_tensor<true>(at, linear, count) : multiply_tensor<false>(at, linear, count);
    } else {  // never staged
      multiply_tensor<false>(at, linear, count);
    }
  }

  // On tensor cores.
  template <bool kStaged>
  BIFLOW_DEVICE void multiply_tensor(const DecodePlace& at, const DecodeLinear& linear, int count) {
    constexpr int kTiles = tiles(true), kLoads = kStaged ? 2 : kChunk, kStep = kLoads * kDecodeWarps;
    float sum[kTiles][kRowTiles][4] = {};
    struct Chunk {
      float4 x[kLoads][kRowTiles][2];
    };
    const Source from = source(at);
    const Lane lane = lane_of(from);
    const auto load = [&](Chunk& to, int base) {
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const int block = base + c * kDecodeWarps;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // a value in any case: a register that is set in some turns only is kept through all phases
            to.x[c][m][half] = float4{0, 0, 0, 0};
            if (block < linear.blocks)
              to.x[c][m][half] = kStaged ? staged_piece(block, existing(kRowTile * m + 8 * half + g_), t_)
                                         : piece(from, lane.at[m][half], base, c);
          }
      }
    };
    const auto use = [&](const Chunk& chunk, int base) {
      constexpr int kBetween = kAtOnce / kTiles;  // blocks that are used before their weights' places are filled
      static_assert(kBetween >= 1 && kBetween * kTiles <= kAtOnce && kAtOnce < kRing);
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        if (base + c * kDecodeWarps >= linear.blocks) break;
        if (c % kBetween == 0) weights_.wait();
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j >= count) break;
          const uint4 w = weights_.next();
          const uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            const uint4 top = words(chunk.x[c][m][0]), bottom = words(chunk.x[c][m][1]);
            const uint32_t a[4] = {top.x, bottom.x, top.y, bottom.y}, b[4] = {top.z, bottom.z, top.w, bottom.w};
            arch::mma_m16n8k16<arch::bf16>(sum[j][m], a, low, sum[j][m]);
            arch::mma_m16n8k16<arch::bf16>(sum[j][m], b, high, sum[j][m]);
          }
        }
        const bool last = c + 1 == kLoads || base + (c + 1) * kDecodeWarps >= linear.blocks;
        if (last || (c + 1) % kBetween == 0) weights_.fill((c % kBetween + 1) * count);
      }
    };
    if (kStaged) {
      Chunk chunk;
      for (int base = warp_; base < linear.blocks; base += kStep) load(chunk, base), use(chunk, base);
    } else {  // the next chunk is on its way while one is used
      Chunk even, odd;
      load(even, warp_);
      for (int base = warp_; base < linear.blocks; base += 2 * kStep) {
        load(odd, base + kStep);
        use(even, base);
        load(even, base + 2 * kStep);
        use(odd, base + kStep);
      }
    }
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
  template <bool kStaged>
  BIFLOW_DEVICE void multiply_fp32(const DecodePlace& at, const DecodeLinear& linear, int count) {
    constexpr int kTiles = tiles(false), kStep = kChunkFp32 * kDecodeWarps;
    float sum[kTiles][kRows] = {};
    const Source from = source(at);
    const Lane lane = lane_of(from);
    float4* const own = rows_ + warp_ * 4 * kRowTile * 4;  // [block][row][4]: this warp's
    for (int base = warp_; base < linear.blocks; base += kStep) {
      if (!kStaged) {
        float4 x[kChunkFp32][kRowTiles][2] = {};
        const auto each = [&](auto&& take) {
#pragma unroll
          for (int c = 0; c < kChunkFp32; ++c) {
            if (base + c * kDecodeWarps >= linear.blocks) break;
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
              for (int half = 0; half < 2; ++half) take(x[c][m][half], c, m, half);
          }
        };
        each([&](float4& v, int c, int m, int half) { v = piece(from, lane.at[m][half], base, c); });
        __syncwarp();  // the rows before are read
        each([&](float4& v, int c, int m, int half) { own[(c * kRows + kRowTile * m + 8 * half + g_) * 4 + t_] = v; });
        __syncwarp();
      }
#pragma unroll 1
      for (int c = 0; c < kChunkFp32 && base + c * kDecodeWarps < linear.blocks; ++c) {
        const float4* const rows = kStaged ? &staged_piece(base + c * kDecodeWarps, 0, 0) : own + c * 4 * kRows;
        uint4 w[kTiles] = {};
        weights_.wait();
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (j < count) w[j] = weights_.next();
        weights_.fill(count);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows_here_) break;
          const float4 v = rows[4 * r + t_];
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            sum[j][r] += __uint_as_float(w[j].x) * v.x + __uint_as_float(w[j].y) * v.y + __uint_as_float(w[j].z) * v.z +
                         __uint_as_float(w[j].w) * v.w;
        }
      }
    }
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

  BIFLOW_DEVICE static uint4 words(const float4& v) {
    return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
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
  const int row_group_, owner_, warp_, g_, t_, rows_here_;
  DecodeLinear* const linears_;
  WeightStream<Act, kRowTiles> weights_;
  float* sums_;
  float4* rows_;
};

}  // namespace biflow::cuda
