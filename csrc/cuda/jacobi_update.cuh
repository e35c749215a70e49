// One fixed-point step on a GPU: a window's x is replaced, and each sample's largest update and residual found, in one
// pass over x, z and raw: 5 elements moved for each of x.
//
// A window is a run of W D neighbouring elements of a sample, in vectors of V, the largest power of two up to 4 that
// divides D. A unit is a chunk of it, worked on by `lanes` threads: part of a warp or a block. A largest value does not
// depend on the order in which it is found, so neither do the results on how the work is divided.
#pragma once

#include "arch/arch.cuh"
#include "cuda/access.cuh"
#include "cuda/affine_math.cuh"
#include "cuda/divide.cuh"
#include "jacobi_update.h"

namespace biflow::cuda {

constexpr int kJacobiThreads = 256;        // of a block
constexpr uint32_t kPoison = 0x7fffffffu;  // a NaN that is larger than any other bits of a positive float

struct JacobiPlan {
  bool aligned;        // every address is a multiple of what accesses by vectors need
  int64_t count;       // vectors of a sample's window
  int64_t first;       // its first token in data order
  int64_t chunks;      // of a sample's window
  uint32_t chunk;      // vectors of a chunk; the last one of a sample may have fewer
  uint32_t log_lanes;  // threads of a unit; at most a block
  uint32_t row;        // vectors of a token's row
  Divisor by_row;
  // An access of raw is one piece of V elements (shifts alone) or two, at stride * channel + piece[0], and + piece[1].
  // Planar rows: a's and b's. Pairs: the two halves of a0 b0 a1 b1 ..
  bool pairs;
  uint32_t columns, stride;  // columns: of a row of raw
  uint32_t piece[2];
};

// Non-negative floats and kPoison are ordered as their bits are.
struct Moved {
  uint32_t update = 0, residual = 0;

  BIFLOW_DEVICE void take(const Moved& other) {
    update = max(update, other.update);
    residual = max(residual, other.residual);
  }
  BIFLOW_DEVICE Moved of_lane(uint32_t mask) const {
    return {__shfl_xor_sync(0xffffffffu, update, mask), __shfl_xor_sync(0xffffffffu, residual, mask)};
  }
};

// The step of V elements.
template <ScaleMap kMap, int V>
BIFLOW_DEVICE void step(const float (&a)[V], const float (&b)[V], const float (&z)[V], float (&x)[V], Moved& moved) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float fresh = z[i] * scale_map<kMap>(a[i], false).factor + b[i];
    const float back = (x[i] - b[i]) * scale_map<kMap>(a[i], true).factor;
    const bool finite = absolute(fresh) < INFINITY && absolute(back) < INFINITY;  // NaN compares false
    const float update = absolute(fresh - x[i]) / fmaxf(1.0f, absolute(fresh));
    const float residual = absolute(back - z[i]) / fmaxf(1.0f, absolute(z[i]));
    moved.take(finite ? Moved{__float_as_uint(update), __float_as_uint(residual)} : Moved{kPoison, kPoison});
    x[i] = fresh;
  }
}

// The vector j of a unit whose first one lies at `vector` of its row: `token` counts rows from the tensors' start.
template <bool kAligned, int V>
BIFLOW_DEVICE void step_vector(const JacobiUpdateParams& p, const JacobiPlan& plan, const Clipping<float>& clip_a,
                               const Clipping<float>& clip_b, int64_t token, uint32_t place, Moved& moved) {
  const uint32_t t = plan.by_row.quotient(place), channel = plan.by_row.rest(place, t) * V;
  const int64_t at = (token + t) * p.D + channel;
  const float* const raw = p.raw + (token + t) * plan.columns + plan.stride * channel;
  float x[V], z[V], low[V] = {}, high[V];
  load_vector<kAligned>(x, p.x + at);
  load_vector<kAligned>(z, p.z + at);
  load_vector<kAligned>(high, raw + plan.piece[1]);
  if (!p.shift_only) load_vector<kAligned>(low, raw + plan.piece[0]);
  float a[V], b[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const auto paired = [&](int e) { return e < V ? low[e] : high[e - V]; };  // a0 b0 a1 b1 ..
    a[i] = plan.pairs ? paired(2 * i) : low[i];
    b[i] = plan.pairs ? paired(2 * i + 1) : high[i];
  }
  clip_a.apply(a);
  clip_b.apply(b);
  with_scale_map(p.affine.scale, [&](auto map) { step<map.value>(a, b, z, x, moved); });
  store_vector<kAligned>(x, p.x + at);
}

template <int V>
__global__ void __launch_bounds__(kJacobiThreads) jacobi_step(JacobiUpdateParams p, JacobiPlan plan) {
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kJacobiThreads + threadIdx.x) >> plan.log_lanes;
  const uint32_t lanes = 1u << plan.log_lanes, lane = threadIdx.x & (lanes - 1);
  int64_t sample = unit, start = 0, t = 0;  // the unit's first vector and token in its sample's window
  uint32_t vector = 0;                      // its place in its row
  if (plan.chunks > 1) {                    // then a unit is a block
    sample = blockIdx.x / static_cast<uint32_t>(plan.chunks);
    start = (unit - sample * plan.chunks) * plan.chunk;
    t = start / plan.row;
    vector = static_cast<uint32_t>(start - t * plan.row);
  }
  const int64_t left = plan.count - start;
  const uint32_t count = sample >= p.B ? 0 : left < plan.chunk ? static_cast<uint32_t>(left) : plan.chunk;
  const int64_t token = sample * p.T + plan.first + t;
  const Clipping<float> clip_a(p.affine, true), clip_b(p.affine, p.affine.clip_on == ClipOn::both);
  Moved moved;
  for (uint32_t j = lane; j < count; j += lanes) {
    if (V == 1 || plan.aligned)
      step_vector<true, V>(p, plan, clip_a, clip_b, token, vector + j, moved);
    else
      step_vector<false, V>(p, plan, clip_a, clip_b, token, vector + j, moved);
  }
  for (uint32_t o = lanes < 32 ? lanes / 2 : 16; o > 0; o /= 2) moved.take(moved.of_lane(o));
  if (lanes > 32) {
    BIFLOW_SHARED(Moved, of_warps, [kJacobiThreads / 32]);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = moved;
    __syncthreads();
    const uint32_t warp = (threadIdx.x & ~(lanes - 1)) / 32;
    for (uint32_t i = 0; i < lanes / 32; ++i) moved.take(of_warps[warp + i]);
  }
  if (lane != 0 || count == 0) return;
  uint32_t* const out = reinterpret_cast<uint32_t*>(p.moved) + sample;
  if (plan.chunks > 1) {
    atomicMax(out, moved.update);
    atomicMax(out + p.B, moved.residual);
  } else {
    out[0] = moved.update;
    out[p.B] = moved.residual;
  }
}

// What the chunks of a sample meet in, and what is largest of no elements.
__global__ void __launch_bounds__(kJacobiThreads) jacobi_clear(float* moved, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kJacobiThreads + threadIdx.x;
  if (i < count) moved[i] = 0;
}

}  // namespace biflow::cuda
