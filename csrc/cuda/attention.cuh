// Attention on tensor cores, sm_80 and later: online softmax over tiles of 64 keys (Milakov & Gimelshein, arXiv
// 1805.02867; FlashAttention-2, arXiv 2307.08691), mma.sync m16n8k16 with fp32 sums.
//
// A warp owns 16 or 32 queries: q, the logits of a tile and the output stay in its registers, and warps meet only at
// the barrier that hands over a tile of keys. Keys and values come by cp.async, two tiles ahead; the thread that copied
// a piece of a key also normalises and rotates it, in place, before that barrier. Where shared memory holds all keys of
// the head, the block goes over its further query tiles without copy, norm or barrier.
//
// The sum over channels may run in any order: lane t of a quad takes channels 8t to 8t+7 of every 32 instead of the
// pairs that the instruction's own numbering would give it, for q and k alike. So both are read by 16-byte accesses, q
// straight from global memory.
#pragma once

#include "arch/arch.cuh"
#include "attention.h"

namespace biflow::cuda {

constexpr int kKeys = 64;            // of a tile
constexpr int kShort = 16;           // read of the last tile, if it has no more
constexpr int kAhead = 2;            // tiles on their way while one is in use
constexpr int kStages = kAhead + 1;  // tiles that shared memory holds, if not all
constexpr int kMaxThreads = 256;     // of a block

template <class T>
using Chunk = arch::Vector<T, 8>;  // 16 bytes

// Where a chunk of a key or value lies in its tile, in elements. Eight lanes at a time access a row's chunks (copies),
// four chunks of the rows 2i and 2i + 1 (keys) or one chunk of eight rows (values): always the eight different 16-byte
// columns of the banks.
template <int d>
BIFLOW_DEVICE int place(int row, int chunk) {
  const int turn = d == 32 ? row >> 1 & 3 : (row & 1) << 2 | (row >> 1 & 3);
  return row * d + (chunk ^ turn) * 8;
}

template <class T>
BIFLOW_DEVICE float sum_of_squares(const Chunk<T>& x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = arch::to_float(x.v[i]);
    sum += v * v;
  }
  return sum;
}

// The sum over `lanes` neighbours, a power of two.
BIFLOW_DEVICE float add_up(float v, int lanes) {
  for (int i = 1; i < lanes; i *= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}

// Eight channels of a token: times factor and weight, if any; then pairs turned by cos and sin, if any; then rounded.
template <class T>
BIFLOW_DEVICE Chunk<T> normed_and_turned(const Chunk<T>& x, float factor, const float* weight, const float* cos,
                                         const float* sin) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = arch::to_float(x.v[i]);
  if (weight != nullptr) {
    const auto w = arch::Vector<float, 8>::load(weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= factor * w.v[i];
  }
  if (cos != nullptr) {
    const auto c = arch::Vector<float, 4>::load(cos), s = arch::Vector<float, 4>::load(sin);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float even = v[2 * i], odd = v[2 * i + 1];
      v[2 * i] = even * c.v[i] - odd * s.v[i];
      v[2 * i + 1] = even * s.v[i] + odd * c.v[i];
    }
  }
  Chunk<T> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = arch::pack<T>(v[2 * i], v[2 * i + 1]);
    memcpy(static_cast<void*>(y.v + 2 * i), &pair, 4);
  }
  return y;
}

// Angles of a token's chunk, or null: a token of the prefix, or no rotary embedding.
template <int d>
BIFLOW_DEVICE const float* angles(const float* table, int prefix, int token, int chunk) {
  return table == nullptr || token < prefix ? nullptr : table + int64_t{token - prefix} * (d / 2) + chunk * 4;
}

// The keys and values of one head and what shared memory holds of them.
template <class T, int d>
class Ring {
 public:
  BIFLOW_DEVICE Ring(const AttentionParams& p, const AttentionPlan& plan, unsigned char* shared, int64_t b, int64_t h)
      : p_(p),
        tiles_(reinterpret_cast<T*>(shared)),
        stages_(plan.stages),
        k_(static_cast<const T*>(p.k.data) + b * p.k.sample + h * p.k.head),
        v_(static_cast<const T*>(p.v.data) + b * p.v.sample + h * p.v.head),
        mask_(p.mask == nullptr ? nullptr : p.mask + b * p.Tk),
        row_(threadIdx.x / kChunks),
        chunk_(threadIdx.x % kChunks),
        rows_(blockDim.x / kChunks) {}

  BIFLOW_DEVICE T* keys(int tile) const { return tiles_ + (tile < stages_ ? tile : tile % kStages) * (2 * kKeys * d); }
  BIFLOW_DEVICE T* values(int tile) const { return keys(tile) + kKeys * d; }

  // Keys of a tile that are read: a sequence of 256 tokens and a prefix of 8 has a short one.
  BIFLOW_DEVICE int extent(int tile) const { return p_.Tk - tile * kKeys <= kShort ? kShort : kKeys; }

  // Starts the copy of a tile; keys that do not count become zeros, so that nothing they hold can matter.
  BIFLOW_DEVICE void copy(int tile) const {
    T *const keys_at = keys(tile), *const values_at = values(tile);
    for (int first = 0; first < extent(tile); first += rows_) {
      const int row = first + row_, key = tile * kKeys + row, at = place<d>(row, chunk_);
      const bool read = key < p_.Tk && (mask_ == nullptr || mask_[key]);
      const int64_t from = read ? key : 0;
      arch::cp_async_16(keys_at + at, k_ + from * p_.k.token + chunk_ * 8, read);
      arch::cp_async_16(values_at + at, v_ + from * p_.v.token + chunk_ * 8, read);
    }
  }

  // Norm and rotation of what this thread has copied.
  BIFLOW_DEVICE void prepare(int tile) const {
    if (p_.k_norm == nullptr && p_.cos == nullptr) return;
    T* const keys_at = keys(tile);
    for (int first = 0; first < extent(tile); first += rows_) {
      const int row = first + row_, key = tile * kKeys + row;
      T* const at = keys_at + place<d>(row, chunk_);
      const auto x = Chunk<T>::load(at);
      float factor = 1;
      const float* weight = nullptr;
      if (p_.k_norm != nullptr) {
        factor = arch::rsqrt_fast(add_up(sum_of_squares(x), kChunks) / d + p_.eps);
        weight = p_.k_norm + chunk_ * 8;
      }
      const bool inside = key < p_.Tk;
      const float* const cos = inside ? angles<d>(p_.cos, p_.prefix, key, chunk_) : nullptr;
      const float* const sin = inside ? angles<d>(p_.sin, p_.prefix, key, chunk_) : nullptr;
      normed_and_turned(x, factor, weight, cos, sin).store(at);
    }
  }

  // Which keys of a tile count, a bit each: the same in every lane. All lanes call it.
  BIFLOW_DEVICE void counting(int tile, uint32_t (&bits)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile * kKeys + 32 * half + threadIdx.x % 32;
      bits[half] = __ballot_sync(0xffffffffu, key < p_.Tk && (mask_ == nullptr || mask_[key]));
    }
  }

  // Whether every key of a tile counts, without a look at them.
  BIFLOW_DEVICE bool all_count(int tile) const { return mask_ == nullptr && (tile + 1) * kKeys <= p_.Tk; }

 private:
  static constexpr int kChunks = d / 8;

  const AttentionParams& p_;
  T* const tiles_;  // [stages][keys, values][kKeys][d]
  const int stages_;
  const T *const k_, *const v_;
  const bool* const mask_;
  const int row_, chunk_, rows_;  // this thread copies chunk_ of the rows row_, row_ + rows_, ...
};

// The queries of one warp, 16 kRowTiles of them from `first` on. Lane (g, t) = (lane / 4, lane % 4) has, of the queries
// first + 16 m + 8 h + g, the logits of keys 8 n + 2 t + e and the outputs of channels 8 n + 2 t + e.
template <class T, int d, int kRowTiles>
class Queries {
 public:
  BIFLOW_DEVICE Queries(const AttentionParams& p, int64_t b, int64_t h, int first)
      : p_(p), first_(first), g_(threadIdx.x % 32 / 4), t_(threadIdx.x % 4) {
    const T* const q = static_cast<const T*>(p.q.data) + b * p.q.sample + h * p.q.head;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c = 0; c < d / 32; ++c) {
          const int row = query(m, half);
          Chunk<T> x = {};
          if (row < p.Tq) x = Chunk<T>::load(q + row * p.q.token + (4 * c + t_) * 8);
          set(m, half, c, x);
        }
    if (p.q_norm != nullptr || p.cos != nullptr) prepare();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top_[m][half] = -INFINITY;
        sum_[m][half] = 0;
      }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < d / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[m][n][i] = 0;
  }

  // Takes in a tile of keys.
  BIFLOW_DEVICE void attend(const Ring<T, d>& ring, int tile) {
    ring.extent(tile) == kKeys ? attend_to<kKeys>(ring, tile) : attend_to<kShort>(ring, tile);
  }

  BIFLOW_DEVICE void store(T* out, int64_t b, int64_t h) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = add_up(sum_[m][half], 4);
        const float factor = sum == 0 ? 0 : 1 / sum;  // 0: a query without keys
        const int row = query(m, half);
        T* const at = out + ((b * p_.Tq + row) * p_.H + h) * d;
#pragma unroll
        for (int c = 0; c < d / 32; ++c) {
          arch::Vector<uint32_t, 4> x;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x.v[i] = arch::pack<T>(o_[m][4 * c + i][2 * half] * factor, o_[m][4 * c + i][2 * half + 1] * factor);
          transpose(x.v);
          if (row < p_.Tq) x.store(reinterpret_cast<uint32_t*>(at + (4 * c + t_) * 8));
        }
      }
  }

 private:
  BIFLOW_DEVICE int query(int m, int half) const { return first_ + 16 * m + 8 * half + g_; }

  // Chunk 4 c + t of a row is k-step 2 c (words 0, 1) and 2 c + 1 (words 2, 3) of this lane's fragments.
  BIFLOW_DEVICE void set(int m, int half, int c, const Chunk<T>& x) {
    uint32_t w[4];
    memcpy(w, x.v, 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) q_[m][2 * c + i / 2][i % 2 * 2 + half] = w[i];
  }
  BIFLOW_DEVICE Chunk<T> get(int m, int half, int c) const {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = q_[m][2 * c + i / 2][i % 2 * 2 + half];
    Chunk<T> x;
    memcpy(static_cast<void*>(x.v), w, 16);
    return x;
  }

  // Norm and rotation.
  BIFLOW_DEVICE void prepare() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = query(m, half);
        float factor = 1;
        if (p_.q_norm != nullptr) {
          float squares = 0;
#pragma unroll
          for (int c = 0; c < d / 32; ++c) squares += sum_of_squares(get(m, half, c));
          factor = arch::rsqrt_fast(add_up(squares, 4) / d + p_.eps);
        }
#pragma unroll
        for (int c = 0; c < d / 32; ++c) {
          const int chunk = 4 * c + t_;
          const bool inside = row < p_.Tq;
          set(m, half, c,
              normed_and_turned(get(m, half, c), factor, p_.q_norm == nullptr ? nullptr : p_.q_norm + chunk * 8,
                                inside ? angles<d>(p_.cos, p_.prefix, row, chunk) : nullptr,
                                inside ? angles<d>(p_.sin, p_.prefix, row, chunk) : nullptr));
        }
      }
  }

  template <int kCount>
  BIFLOW_DEVICE void attend_to(const Ring<T, d>& ring, int tile) {
    float s[kRowTiles][kCount / 8][4];
    multiply_keys(ring.keys(tile), s);
    if (!ring.all_count(tile) || (p_.causal && (tile + 1) * kKeys - 1 > first_ + p_.Tk - p_.Tq)) {
      uint32_t bits[2];
      ring.counting(tile, bits);
      leave_out(tile * kKeys, bits, s);
    }
    exponentiate(s);
    multiply_values(ring.values(tile), s);
  }

  // s = q k^T.
  template <int kGroups>
  BIFLOW_DEVICE void multiply_keys(const T* keys, float (&s)[kRowTiles][kGroups][4]) const {
    const int key_lane = place<d>(g_, t_);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
#pragma unroll
      for (int c = 0; c < d / 32; ++c) {
        const auto w = arch::Vector<uint32_t, 4>::load(
            reinterpret_cast<const uint32_t*>(keys + 8 * n * d + (key_lane ^ 32 * c)));  // place(8 n + g, 4 c + t)
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t b[2] = {w.v[2 * step], w.v[2 * step + 1]};
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) arch::mma_m16n8k16<T>(s[m][n], q_[m][2 * c + step], b, s[m][n]);
        }
      }
    }
  }

  // Logits of keys that do not count, by their bits or by causality, become -infinity.
  template <int kGroups>
  BIFLOW_DEVICE void leave_out(int first_key, const uint32_t (&bits)[2], float (&s)[kRowTiles][kGroups][4]) const {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * n + 2 * t_ + e;
        const bool counts = bits[n / 4] >> key % 32 & 1;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (!counts || (p_.causal && first_key + key > query(m, half) + p_.Tk - p_.Tq))
              s[m][n][2 * half + e] = -INFINITY;
      }
  }

  // s = exp(scale (s - largest so far)); the sums and outputs so far are brought to the new largest logit.
  template <int kGroups>
  BIFLOW_DEVICE void exponentiate(float (&s)[kRowTiles][kGroups][4]) {
    const float scale = p_.scale * 1.4426950408889634f;  // powers of 2
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = top_[m][half];
#pragma unroll
        for (int n = 0; n < kGroups; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float base = top == -INFINITY ? 0 : top * scale;  // no key yet: every power is 0, not NaN
        const float factor = arch::exp2_fast(top_[m][half] * scale - base);
        top_[m][half] = top;
        float sum = sum_[m][half] * factor;
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float power = arch::exp2_fast(s[m][n][2 * half + e] * scale - base);
            s[m][n][2 * half + e] = power;
            sum += power;
          }
        sum_[m][half] = sum;
#pragma unroll
        for (int n = 0; n < d / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) o_[m][n][2 * half + e] *= factor;
      }
  }

  // o += s v.
  template <int kGroups>
  BIFLOW_DEVICE void multiply_values(const T* values, const float (&s)[kRowTiles][kGroups][4]) {
    const int lane = threadIdx.x % 32, value_lane = place<d>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < kGroups / 2; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const x = s[m][2 * step + i / 2] + i % 2 * 2;
          a[m][i] = arch::pack<T>(x[0], x[1]);
        }
#pragma unroll
      for (int n = 0; n < d / 8; n += 2) {
        uint32_t v[4];
        // place(16 step + lane % 16, n + lane / 16)
        arch::ldmatrix_x4_transposed(v, values + 16 * step * d + (value_lane ^ 8 * n));
        const uint32_t left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          arch::mma_m16n8k16<T>(o_[m][n], a[m], left, o_[m][n]);
          arch::mma_m16n8k16<T>(o_[m][n + 1], a[m], right, o_[m][n + 1]);
        }
      }
    }
  }

  // Within a quad, lane t has word t of chunks 0 to 3, and gets words 0 to 3 of chunk t.
  BIFLOW_DEVICE void transpose(uint32_t (&w)[4]) const {
    exchange(w[0], w[1], 1);
    exchange(w[2], w[3], 1);
    exchange(w[0], w[2], 2);
    exchange(w[1], w[3], 2);
  }
  // The lane whose bit is not set gives `high` for the other's `low`.
  BIFLOW_DEVICE void exchange(uint32_t& low, uint32_t& high, int bit) const {
    const bool upper = t_ & bit;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
    (upper ? low : high) = got;
  }

  const AttentionParams& p_;
  const int first_, g_, t_;
  uint32_t q_[kRowTiles][d / 16][4];  // fragments
  float o_[kRowTiles][d / 8][4];      // times sum
  float top_[kRowTiles][2];           // largest logit so far, without scale
  float sum_[kRowTiles][2];           // of the powers, this lane's keys
};

template <class T, int d, int kRowTiles>
__global__ void __launch_bounds__(kMaxThreads, 1) attention_kernel(AttentionParams p, AttentionPlan plan) {
  BIFLOW_DYNAMIC_SHARED(shared);
  const int head = blockIdx.x / plan.blocks, heads = static_cast<int>(p.H);
  const int64_t b = head / heads, h = head % heads;
  const Ring<T, d> ring(p, plan, shared, b, h);
  const int rows = 16 * kRowTiles * plan.warps;
  // Which of the block's queries are a warp's changes from head to head: warps of one number share a scheduler, and the
  // first ones have most of a ragged end, the last ones most of causal work.
  const int warp = __shfl_sync(0xffffffffu, (static_cast<int>(threadIdx.x) / 32 + head) % plan.warps, 0);
  // a block's query tiles, from the one that sees most keys down
  const int last = (p.Tq - 1) / rows - static_cast<int>(blockIdx.x % plan.blocks);
  const auto key_tiles = [&](int queries) {  // that the first `queries` see
    return ((p.causal ? min(queries + p.Tk - p.Tq, p.Tk) : p.Tk) + kKeys - 1) / kKeys;
  };
  const int tiles = key_tiles((last + 1) * rows);

  for (int tile = 0; tile < kAhead; ++tile) {
    if (tile < tiles) ring.copy(tile);
    arch::cp_async_commit();
  }
  for (int turn = last; turn >= 0; turn -= plan.blocks) {
    const int first = turn * rows + 16 * kRowTiles * warp;
    Queries<T, d, kRowTiles> queries(p, b, h, first);
    const int seen = first < p.Tq ? key_tiles(first + 16 * kRowTiles) : 0;
    const int end = turn == last ? tiles : seen;
    for (int tile = 0; tile < end; ++tile) {
      if (turn == last) {
        arch::cp_async_wait<kAhead - 1>();
        ring.prepare(tile);
        __syncthreads();  // the tile is there, and nobody reads the one before it any more
        if (tile + kAhead < tiles) ring.copy(tile + kAhead);
        arch::cp_async_commit();
      }
      if (tile < seen) queries.attend(ring, tile);
    }
    queries.store(static_cast<T*>(p.out), b, h);
  }
}

}  // namespace biflow::cuda
