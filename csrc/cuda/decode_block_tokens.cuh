// The tokens of decode_block: what comes out, x_n = z_n sigma + b from the raw parameters, and what goes in.
#pragma once

#include "cuda/affine_math.cuh"
#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {

class StepTokens {
 public:
  BIFLOW_DEVICE explicit StepTokens(const DecodeState& s) : s_(s) {}

  // Channel d of what the network reads of a sequence in this step: the start token, or the token before, which
  // `writes` puts into the output.
  BIFLOW_DEVICE float input(int step, int64_t sequence, int d, bool writes) const {
    const int n = s_.produced(step);
    if (n < 0) return __ldg(s_.weights + s_.packed.start_token + d);
    const bool conditional = sequence < s_.batch;
    const int64_t b = conditional ? sequence : sequence - s_.batch;
    const float v = produced(b, n, d, s_.evaluated(step) > 0);
    if (writes && conditional) put(b, n, d, v);
    return v;
  }

  // After the last step: the last token.
  BIFLOW_DEVICE void produce_last() const {
    const int64_t size = s_.batch * s_.channels;
    for (int64_t i = first(); i < size; i += threads()) {
      const int64_t b = i / s_.channels;
      const int d = static_cast<int>(i % s_.channels);
      put(b, s_.tokens - 1, d, produced(b, s_.tokens - 1, d, s_.evaluated(s_.steps) > 0));
    }
  }

  // A token of the prefix, which is given at the network's width.
  BIFLOW_DEVICE void copy_prefix(int step) const {
    for (int64_t i = first(); i < static_cast<int64_t>(s_.rows) * s_.width; i += threads()) {
      const int64_t row = i / s_.width, c = i % s_.width;
      const bool conditional = row < s_.batch;
      const float* const from = conditional ? s_.condition.prefix : s_.condition.null_prefix;
      const int64_t b = conditional ? row : row - s_.batch;
      s_.x[row * s_.x_stride + c] = __ldg(from + (b * s_.prefix + step) * s_.width + c);
    }
  }

 private:
  BIFLOW_DEVICE static int64_t first() { return static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x; }
  BIFLOW_DEVICE static int64_t threads() { return static_cast<int64_t>(gridDim.x) * kDecodeThreads; }

  // Channel d of token n of sample b. have_raw: from the raw parameters of the last step, otherwise they are 0.
  BIFLOW_DEVICE float produced(int64_t b, int n, int d, bool have_raw) const {
    float a[1] = {0}, shift[1] = {0};
    if (have_raw) {
      const bool pairs = s_.affine.layout == Layout::interleaved, swapped = s_.affine.layout == Layout::shift_scale;
      const int D = s_.channels;
      if (!s_.shift_only) a[0] = raw(b, n, pairs ? 2 * d : swapped ? D + d : d, s_.condition.guide_a);
      shift[0] = raw(b, n, s_.shift_only ? d : pairs ? 2 * d + 1 : swapped ? d : D + d, s_.condition.guide_b);
    }
    Clipping<float>(s_.affine, true).apply(a);
    Clipping<float>(s_.affine, s_.affine.clip_on == ClipOn::both).apply(shift);
    float sigma = 1;
    if (!s_.shift_only)
      with_scale_map(s_.affine.scale, [&](auto map) { sigma = scale_map<decltype(map)::value>(a[0], false).factor; });
    return __ldg(s_.z + (b * s_.tokens + s_.data_index(n)) * s_.channels + d) * sigma + shift[0];
  }

  // One raw parameter, guided.
  BIFLOW_DEVICE float raw(int64_t b, int n, int column, bool guide) const {
    const float v = __ldcg(s_.raw + b * s_.raw_stride + column);
    if (!s_.condition.guided || !guide) return v;
    const float last = s_.tokens > 1 ? static_cast<float>(s_.tokens - 1) : 1.0f;
    const float g = s_.condition.anneal ? s_.condition.guidance * n / last : s_.condition.guidance;
    return v + g * (v - __ldcg(s_.raw + (b + s_.batch) * s_.raw_stride + column));
  }

  BIFLOW_DEVICE void put(int64_t b, int n, int d, float v) const {
    s_.out[(b * s_.tokens + s_.data_index(n)) * s_.channels + d] = v;
  }

  const DecodeState& s_;
};

}  // namespace biflow::cuda
