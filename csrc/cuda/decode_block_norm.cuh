// LayerNorm and RMSNorm of the residual stream: of one row by one warp, and the phase of its own.
#pragma once

#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {

BIFLOW_DEVICE void load4(float (&v)[4], const float* p) {
  const float4 x = __ldcg(reinterpret_cast<const float4*>(p));
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

// Rounded, and to `to`: as many neighbouring values.
template <class Act>
BIFLOW_DEVICE void store4(Act* to, const float (&v)[4]) {
  arch::Vector<Act, 4> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.v[i] = arch::from_float<Act>(v[i]);
  y.store(to);
}

class RowNorm {
  static constexpr int kKept = 6;  // fours of channels that a lane keeps in registers: of rows up to 768 wide, all

 public:
  // The first or second norm of a layer.
  BIFLOW_DEVICE RowNorm(const DecodeState& s, int layer, bool first) : s_(s) {
    const PackedLayer& l = s.packed.layer;
    weight_ = layer_vector(s, layer, first ? l.norm1_weight : l.norm2_weight);
    bias_ = s.rmsnorm ? nullptr : layer_vector(s, layer, first ? l.norm1_bias : l.norm2_bias);
  }

  // store(c, y) for all channels of a row, with the padding: norm(x) of channels c to c + 3. One warp, two passes: the
  // mean, then the sum of the squares around it, never a difference of large sums.
  template <class Store>
  BIFLOW_DEVICE void apply(const float* x, Store&& store) const {
    const int lane = threadIdx.x % 32;
    float kept[kKept][4] = {};
    float4 w[kKept] = {}, b[kKept] = {};  // all are on their way at once: one round trip, not one after another
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (channel(lane, i) >= s_.x_stride) continue;
      load4(kept[i], x + channel(lane, i));
      w[i] = weight(channel(lane, i)), b[i] = bias(channel(lane, i));
    }
    const auto each = [&](auto&& take) {
#pragma unroll
      for (int i = 0; i < kKept; ++i)
        if (channel(lane, i) < s_.x_stride) take(channel(lane, i), kept[i]);
      for (int i = kKept; channel(lane, i) < s_.x_stride; ++i) {
        float v[4];
        load4(v, x + channel(lane, i));
        take(channel(lane, i), v);
      }
    };
    const float share = 1.0f / static_cast<float>(s_.width);
    float mean = 0, squares = 0;
    if (!s_.rmsnorm) {
      each([&](int, const float (&v)[4]) { mean += (v[0] + v[1]) + (v[2] + v[3]); });  // what is padded is zero
      mean = over_warp(mean) * share;
    }
    each([&](int c, const float (&v)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float apart = c + k < s_.width ? v[k] - mean : 0;
        squares += apart * apart;
      }
    });
    const float scale = rsqrtf(over_warp(squares) * share + (s_.rmsnorm ? 1e-6f : 1e-5f));
    const auto put = [&](int c, const float (&v)[4], const float4& w, const float4& b) {
      const float y[4] = {(v[0] - mean) * scale * w.x + b.x, (v[1] - mean) * scale * w.y + b.y,
                          (v[2] - mean) * scale * w.z + b.z, (v[3] - mean) * scale * w.w + b.w};
      store(c, y);
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (channel(lane, i) < s_.x_stride) put(channel(lane, i), kept[i], w[i], b[i]);
    for (int i = kKept; channel(lane, i) < s_.x_stride; ++i) {
      float v[4];
      load4(v, x + channel(lane, i));
      put(channel(lane, i), v, weight(channel(lane, i)), bias(channel(lane, i)));
    }
  }

 private:
  BIFLOW_DEVICE static int channel(int lane, int i) { return 4 * (lane + 32 * i); }

  // Of four channels; zero where x is padded.
  BIFLOW_DEVICE float4 weight(int c) const { return __ldg(reinterpret_cast<const float4*>(weight_ + c)); }
  BIFLOW_DEVICE float4 bias(int c) const {
    return bias_ == nullptr ? float4{0, 0, 0, 0} : __ldg(reinterpret_cast<const float4*>(bias_ + c));
  }

  BIFLOW_DEVICE static float over_warp(float v) {
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
  }

  const DecodeState& s_;
  const float *weight_, *bias_;  // bias: null with RMSNorm
};

// The phase: y = norm(x), a warp a row.
template <class Act>
BIFLOW_DEVICE void normalize(const DecodeState& s, const DecodePlace& at) {
  const RowNorm norm(s, at.layer, at.phase == DecodePhase::norm1);
  const int step = static_cast<int>(gridDim.x) * kDecodeWarps;
  for (int row = static_cast<int>(blockIdx.x + threadIdx.x / 32 * gridDim.x); row < s.rows; row += step) {
    const int64_t offset = static_cast<int64_t>(row) * s.x_stride;
    norm.apply(s.x + offset, [&](int c, const float (&v)[4]) { store4(static_cast<Act*>(s.y) + offset + c, v); });
  }
}

}  // namespace biflow::cuda
