// LayerNorm and RMSNorm of the residual stream: moments that threads join, and the phase of its own.
#pragma once

#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {

BIFLOW_DEVICE void load4(float (&v)[4], const float* p) {
  const float4 x = __ldcg(reinterpret_cast<const float4*>(p));
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

// Of some numbers: how many, mean, sum of squared deviations; with RMSNorm the sum of squares. Joined as in Chan, Golub
// and LeVeque, 1979: never a difference of large sums.
struct Moments {
  float count = 0, mean = 0, squares = 0;
};

class RowNorm {
 public:
  // The first or second norm of a layer.
  BIFLOW_DEVICE RowNorm(const DecodeState& s, int layer, bool first) : s_(s) {
    const PackedLayer& l = s.packed.layer;
    weight_ = layer_vector(s, layer, first ? l.norm1_weight : l.norm2_weight);
    bias_ = s.rmsnorm ? nullptr : layer_vector(s, layer, first ? l.norm1_bias : l.norm2_bias);
  }

  BIFLOW_DEVICE Moments joined(const Moments& a, const Moments& b) const {
    if (s_.rmsnorm) return {a.count + b.count, 0, a.squares + b.squares};
    const float count = a.count + b.count, share = count > 0 ? b.count / count : 0, apart = b.mean - a.mean;
    return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
  }

  // Of n channels from c on; those past the width are left out.
  template <int n>
  BIFLOW_DEVICE Moments moments(const float (&x)[n], int c) const {
    const int valid = s_.width - c;
    Moments m;
    m.count = static_cast<float>(valid < 0 ? 0 : valid < n ? valid : n);
    if (!s_.rmsnorm && valid > 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) m.mean += i < valid ? x[i] : 0;
      m.mean /= m.count;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float apart = i < valid ? x[i] - m.mean : 0;
      m.squares += apart * apart;
    }
    return m;
  }

  // Of the lanes that differ in the bits from `from` to below `to`; the same in all of them.
  BIFLOW_DEVICE Moments over_lanes(Moments m, int from, int to) const {
    for (int lane = from; lane < to; lane *= 2)
      m = joined(m, {__shfl_xor_sync(0xffffffffu, m.count, lane), __shfl_xor_sync(0xffffffffu, m.mean, lane),
                     __shfl_xor_sync(0xffffffffu, m.squares, lane)});
    return m;
  }

  // y = norm(x) of n channels from c on, in place; weight and bias are zero where x is padded.
  template <int n>
  BIFLOW_DEVICE void apply(float (&x)[n], int c, const Moments& m) const {
    const float scale = rsqrtf(m.squares / static_cast<float>(s_.width) + (s_.rmsnorm ? 1e-6f : 1e-5f));
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 w = __ldg(reinterpret_cast<const float4*>(weight_ + c + i));
      float4 b = {0, 0, 0, 0};
      if (bias_ != nullptr) b = __ldg(reinterpret_cast<const float4*>(bias_ + c + i));
      x[i] = (x[i] - m.mean) * scale * w.x + b.x;
      x[i + 1] = (x[i + 1] - m.mean) * scale * w.y + b.y;
      x[i + 2] = (x[i + 2] - m.mean) * scale * w.z + b.z;
      x[i + 3] = (x[i + 3] - m.mean) * scale * w.w + b.w;
    }
  }

 private:
  const DecodeState& s_;
  const float *weight_, *bias_;  // bias: null with RMSNorm
};

// The phase: y = norm(x), a warp a row.
template <class Act>
BIFLOW_DEVICE void normalize(const DecodeState& s, const DecodePlace& at) {
  const RowNorm norm(s, at.layer, at.phase == DecodePhase::norm1);
  const int lane = threadIdx.x % 32, step = static_cast<int>(gridDim.x) * kDecodeWarps;
  for (int row = static_cast<int>(blockIdx.x + threadIdx.x / 32 * gridDim.x); row < s.rows; row += step) {
    const float* const x = s.x + static_cast<int64_t>(row) * s.x_stride;
    Moments m;
    for (int c = 4 * lane; c < s.width; c += 128) {
      float v[4];
      load4(v, x + c);
      m = norm.joined(m, norm.moments(v, c));
    }
    m = norm.over_lanes(m, 1, 32);
    for (int c = 4 * lane; c < s.width; c += 128) {
      float v[4];
      load4(v, x + c);
      norm.apply(v, c, m);
      arch::Vector<Act, 4> y;
#pragma unroll
      for (int i = 0; i < 4; ++i) y.v[i] = arch::from_float<Act>(v[i]);
      y.store(static_cast<Act*>(s.y) + static_cast<int64_t>(row) * s.x_stride + c);
    }
  }
}

}  // namespace biflow::cuda
