// The affine coupling on a GPU: every byte moves once, 4N elements for a value, 7N for its gradients.
//
// Work. A sample's T D elements are vectors of V, the largest power of two up to 16 bytes of the narrower dtype that
// divides D: no vector straddles a row, and data and params are accessed by vectors. A unit is a chunk of a sample,
// worked on by `lanes` threads: a block for a long sample, part of a warp for a short one. V, chunks and lanes depend
// on T, D and the dtypes alone, and so does the order of each sum: a sample's log-determinant has the same bits in any
// batch, at any address, on any device.
//
// Bytes in flight. Before it uses any, a thread loads V or four elements (fp64: two) of x, a and b, a backward of the
// gradient too. With kBlocks blocks on an SM that is 49 to 65 KB in fp32 and in bf16 with V = 8, 25 to 33 KB in bf16
// with narrower vectors; the memory of an H200 wants about 4.8 TB/s x 0.8 us / 132 SMs = 29 KB (estimates).
//
// Types of memory and V are template arguments; everything else is a branch that a whole launch takes alike.
#pragma once

#include <cstring>
#include <type_traits>

#include "arch/arch.cuh"
#include "cuda/access.cuh"
#include "cuda/affine_math.cuh"
#include "cuda/divide.cuh"

namespace biflow::cuda {

constexpr int kAffineThreads = 256;  // of a block
constexpr int kAffineTrip = 16;      // bytes of arithmetic that a thread handles at least between loading and storing

// Blocks of an SM that the compiler is to leave registers for: the most for which nothing spills. 5 blocks: 48
// registers a thread, 4: 64, 3: 80, 2: 128.
template <class S, int V, bool kBackward>
constexpr int kBlocks = sizeof(S) == 8 ? 2 : (kBackward ? 3 : 4) + (V == 2 || V == 4);

struct AffinePlan {
  bool encode;
  bool aligned;        // every address is a multiple of what accesses by vectors need
  int64_t chunks;      // of a sample
  uint32_t chunk;      // vectors of a chunk; the last one of a sample may have fewer
  uint32_t log_lanes;  // threads of a unit; at most a block
  uint32_t row;        // vectors of a token's row
  Divisor by_row;
  // An access of params is two pieces of V elements: at stride * channel + piece[0], and + piece[1]. Planar rows: a's
  // and b's. Pairs: the two halves of a0 b0 a1 b1 ..
  bool pairs;
  uint32_t stride;
  int64_t piece[2];
};

// What `lanes` threads work on. Offsets count elements from the start of a tensor.
//
// Params come from the token before in block order if causal. The first token has none; what is left over is the row
// that the last token wrote: its gradient is 0, and the first token's threads write it.
struct AffineUnit {
  int64_t index, sample;
  uint32_t lane, count;  // this thread takes the vectors lane, lane + lanes, .. < count; 0: there is no such unit
  uint32_t vector;       // the first vector's place in its row
  uint32_t without;      // the token without params, counted from the unit's first one
  int64_t left_over;     // from where its params would be to the row that is left over
  int64_t token, data, params;  // offsets of the first vector's token, its data, the row of its params

  template <int V>
  BIFLOW_DEVICE static AffineUnit of_thread(const AffineParams& p, const AffinePlan& plan) {
    AffineUnit u;
    u.index = (static_cast<int64_t>(blockIdx.x) * kAffineThreads + threadIdx.x) >> plan.log_lanes;
    u.lane = threadIdx.x & ((1u << plan.log_lanes) - 1);
    u.sample = u.index, u.vector = 0;
    int64_t start = 0, t = 0;  // the unit's first vector and token in its sample
    if (plan.chunks > 1) {     // then a unit is a block
      u.sample = blockIdx.x / static_cast<uint32_t>(plan.chunks);
      start = (u.index - u.sample * plan.chunks) * plan.chunk;
      t = start / plan.row;
      u.vector = static_cast<uint32_t>(start - t * plan.row);
    }
    const int64_t left = p.T * plan.row - start;
    u.count = u.sample >= p.B ? 0 : left < plan.chunk ? static_cast<uint32_t>(left) : plan.chunk;
    u.token = u.sample * p.T + t;
    u.data = (u.sample * p.T * plan.row + start) * V;
    const bool causal = p.options.causal, flip = p.options.flip;
    const int64_t until = flip ? p.T - 1 - t : -t;  // from t to the first token in block order
    constexpr uint32_t kNone = 0xffffffffu;
    u.without = causal && until >= 0 && until < kNone ? static_cast<uint32_t>(until) : kNone;
    u.left_over = (flip ? -p.T : p.T) * 2 * p.D;
    u.params = (u.token + (!causal ? 0 : flip ? 1 : -1)) * 2 * p.D;
    return u;
  }
};

// --- elements in memory, by size: bf16 and half share kernels, which ask what the words hold ----------------------

using Word16 = uint16_t;

template <class T, class S, class Word>
BIFLOW_DEVICE S widen_word(Word word) {
  T v;
  memcpy(static_cast<void*>(&v), &word, sizeof(v));
  return arch::to_float(v);
}
template <class T, class Word, class S>
BIFLOW_DEVICE Word narrow_word(S value) {
  const T v = arch::from_float<T>(value);
  Word word;
  memcpy(&word, &v, sizeof(v));
  return word;
}

// to = from[at ..], to[at ..] = from
template <class Word, class S, int n, int k>
BIFLOW_DEVICE void widen(const Word (&from)[n], int at, DType dtype, S (&to)[k]) {
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if constexpr (std::is_same_v<Word, S>)
      to[i] = from[at + i];
    else
      to[i] = dtype == DType::bf16 ? widen_word<arch::bf16, S>(from[at + i]) : widen_word<arch::half, S>(from[at + i]);
  }
}
template <class Word, class S, int n, int k>
BIFLOW_DEVICE void narrow(const S (&from)[k], DType dtype, Word (&to)[n], int at) {
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if constexpr (std::is_same_v<Word, S>)
      to[at + i] = from[i];
    else
      to[at + i] =
          dtype == DType::bf16 ? narrow_word<arch::bf16, Word>(from[i]) : narrow_word<arch::half, Word>(from[i]);
  }
}

// --- a trip ---------------------------------------------------------------------------------------------------------

// What a thread handles between loading and storing, as in memory: n elements in kVectors vectors. The arithmetic takes
// a few at a time, to hold few as numbers of twice the width.
template <class Data, class Net, int V>
struct AffineTrip {
  static constexpr int kGroup = kAffineTrip / (sizeof(Data) == 8 ? 8 : 4), n = V > kGroup ? V : kGroup;
  static constexpr int kVectors = n / V;

  Data v[n], g[n];    // input, the output's gradient; then what is stored in their places
  Net a[n], b[n];     // raw params; then their gradients
  bool on[kVectors];  // the vector exists and the mask transforms it

  struct Place {
    bool exists, has_params;
    int64_t token, data, params;  // offsets
  };

  BIFLOW_DEVICE static Place locate(const AffinePlan& plan, const AffineUnit& unit, uint32_t first, int k) {
    const uint32_t j = first + (static_cast<uint32_t>(k) << plan.log_lanes) + unit.lane;
    const uint32_t place = unit.vector + j, t = plan.by_row.quotient(place), channel = plan.by_row.rest(place, t) * V;
    const uint32_t row = plan.row * V * 2;
    const bool has_params = t != unit.without;
    const int64_t params = unit.params + static_cast<int64_t>(static_cast<uint64_t>(t) * row) + plan.stride * channel;
    return {j < unit.count, has_params, unit.token + t, unit.data + static_cast<int64_t>(j) * V,
            has_params ? params : params + unit.left_over};
  }

  template <bool kBackward, bool kAligned>
  BIFLOW_DEVICE void load(const AffineParams& p, const AffinePlan& plan, const AffineUnit& unit, uint32_t first) {
    const Data* input = static_cast<const Data*>(p.input);
    const Data* grad = static_cast<const Data*>(p.grad_output);
    const Net* params = static_cast<const Net*>(p.params);
    Place at[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      at[k] = locate(plan, unit, first, k);
      on[k] = at[k].exists;
    }
    if (p.mask) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        if (at[k].exists) on[k] = p.mask[at[k].token];
    }
    Data x[kVectors][V] = {}, y[kVectors][V] = {};
    Net low[kVectors][V] = {}, high[kVectors][V] = {};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (at[k].exists) {
        load_vector<kAligned>(x[k], input + at[k].data);
        if constexpr (kBackward) load_vector<kAligned>(y[k], grad + at[k].data);
      }
      if (on[k] && at[k].has_params) {  // what a masked token's params hold must not matter: they are not read
        load_vector<kAligned>(low[k], params + at[k].params + plan.piece[0]);
        load_vector<kAligned>(high[k], params + at[k].params + plan.piece[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int k = i / V, l = i % V;
      const auto paired = [&](int e) { return e < V ? low[k][e] : high[k][e - V]; };  // a0 b0 a1 b1 ..
      v[i] = x[k][l];
      g[i] = y[k][l];
      a[i] = plan.pairs ? paired(2 * l) : low[k][l];
      b[i] = plan.pairs ? paired(2 * l + 1) : high[k][l];
    }
  }

  template <bool kBackward, bool kAligned>
  BIFLOW_DEVICE void store(const AffineParams& p, const AffinePlan& plan, const AffineUnit& unit,
                           uint32_t first) const {
    Data* output = static_cast<Data*>(kBackward ? p.grad_input : p.output);
    Net* params = static_cast<Net*>(p.grad_params);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Place at = locate(plan, unit, first, k);
      if (!at.exists) continue;
      Data x[V];
      Net low[V], high[V];
      const bool has_gradient = on[k] && at.has_params;
      const auto paired = [&](int e) { return e % 2 ? b[k * V + e / 2] : a[k * V + e / 2]; };  // a0 b0 a1 b1 ..
#pragma unroll
      for (int l = 0; l < V; ++l) {
        const int i = k * V + l;
        x[l] = kBackward ? g[i] : v[i];
        if constexpr (kBackward) {
          low[l] = !has_gradient ? Net(0) : plan.pairs ? paired(l) : a[i];
          high[l] = !has_gradient ? Net(0) : plan.pairs ? paired(V + l) : b[i];
        }
      }
      store_vector<kAligned>(x, output + at.data);
      if constexpr (kBackward) {
        store_vector<kAligned>(low, params + at.params + plan.piece[0]);
        store_vector<kAligned>(high, params + at.params + plan.piece[1]);
      }
    }
  }

  // Loads, calls f(first element) for each group, stores.
  template <bool kBackward, class F>
  BIFLOW_DEVICE void run(const AffineParams& p, const AffinePlan& plan, const AffineUnit& unit, uint32_t first, F&& f) {
    if (V == 1 || plan.aligned)
      load<kBackward, true>(p, plan, unit, first);
    else
      load<kBackward, false>(p, plan, unit, first);
#pragma unroll
    for (int i = 0; i < n; i += kGroup) f(i);
    if (V == 1 || plan.aligned)
      store<kBackward, true>(p, plan, unit, first);
    else
      store<kBackward, false>(p, plan, unit, first);
  }

  BIFLOW_DEVICE void on_of_group(int first, bool (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = on[(first + i) / V];
  }
};

// --- kernels --------------------------------------------------------------------------------------------------------

template <class Data, class Net, class S, int V>
__global__ void __launch_bounds__(kAffineThreads, kBlocks<S, V, false>)
    affine_forward(AffineParams p, AffinePlan plan) {
  using Trip = AffineTrip<Data, Net, V>;
  const AffineUnit unit = AffineUnit::of_thread<V>(p, plan);
  const Clipping<S> clip_a(p.options, true), clip_b(p.options, p.options.clip_on == ClipOn::both);
  double sum = 0;
  const uint32_t step = static_cast<uint32_t>(Trip::kVectors) << plan.log_lanes;
  for (uint32_t first = 0; first < unit.count; first += step) {
    Trip t;
    t.template run<false>(p, plan, unit, first, [&](int i) {
      S a[Trip::kGroup], b[Trip::kGroup], v[Trip::kGroup];
      bool on[Trip::kGroup];
      t.on_of_group(i, on);
      widen(t.a, i, p.net, a);
      widen(t.b, i, p.net, b);
      widen(t.v, i, p.data, v);
      clip_a.apply(a);
      clip_b.apply(b);
      with_scale_map(p.options.scale, [&](auto map) { sum += forward<map.value>(plan.encode, a, b, v, on); });
      narrow(v, p.data, t.v, i);
    });
  }
  if (!p.logdet) return;
  const uint32_t lanes = 1u << plan.log_lanes;
  for (uint32_t o = lanes < 32 ? lanes / 2 : 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (lanes > 32) {
    BIFLOW_SHARED(double, sums, [kAffineThreads / 32]);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const uint32_t warp = (threadIdx.x & ~(lanes - 1)) / 32;
    sum = sums[warp];
#pragma unroll 1
    for (uint32_t i = 1; i < lanes / 32; ++i) sum += sums[warp + i];
  }
  if (unit.lane != 0 || unit.count == 0) return;
  if (plan.chunks > 1)
    p.partial[unit.index] = sum;
  else
    static_cast<S*>(p.logdet)[unit.sample] = static_cast<S>(sum);
}

template <class Data, class Net, class S, int V>
__global__ void __launch_bounds__(kAffineThreads, kBlocks<S, V, true>)
    affine_backward(AffineParams p, AffinePlan plan) {
  using Trip = AffineTrip<Data, Net, V>;
  const AffineUnit unit = AffineUnit::of_thread<V>(p, plan);
  const Clipping<S> clip_a(p.options, true), clip_b(p.options, p.options.clip_on == ClipOn::both);
  const S grad_logdet = p.grad_logdet && unit.count ? static_cast<const S*>(p.grad_logdet)[unit.sample] : S(0);
  const uint32_t step = static_cast<uint32_t>(Trip::kVectors) << plan.log_lanes;
  for (uint32_t first = 0; first < unit.count; first += step) {
    Trip t;
    t.template run<true>(p, plan, unit, first, [&](int i) {
      S a[Trip::kGroup], b[Trip::kGroup], v[Trip::kGroup], g[Trip::kGroup];
      bool on[Trip::kGroup];
      t.on_of_group(i, on);
      widen(t.a, i, p.net, a);
      widen(t.b, i, p.net, b);
      widen(t.v, i, p.data, v);
      widen(t.g, i, p.data, g);
      clip_a.prepare(a);
      clip_b.prepare(b);
      with_scale_map(p.options.scale, [&](auto map) {
        if (clip_a.any())
          backward<map.value, true>(plan.encode, clip_a, clip_b, a, b, v, g, grad_logdet, on);
        else
          backward<map.value, false>(plan.encode, clip_a, clip_b, a, b, v, g, grad_logdet, on);
      });
      narrow(a, p.net, t.a, i);
      narrow(b, p.net, t.b, i);
      narrow(g, p.data, t.g, i);
    });
  }
}

// Adds the partial sums of every sample: a warp for each, in an order of their number alone.
template <class S>
__global__ void __launch_bounds__(kAffineThreads) affine_logdet(AffineParams p, int64_t chunks) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * (kAffineThreads / 32) + threadIdx.x / 32;
  double sum = 0;
  if (sample < p.B)
    for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) sum += p.partial[sample * chunks + i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (sample < p.B && threadIdx.x % 32 == 0) static_cast<S*>(p.logdet)[sample] = static_cast<S>(sum);
}

}  // namespace biflow::cuda
