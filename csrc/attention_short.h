// Attention over short sequences in bf16 by AMX, and its gradient: o = softmax(scale q k^T) v. Only CPUs with tile
// products have these kernels; the caller asks first. Maths: biflow/ops/attention.py.
#pragma once

#include <cstdint>

namespace biflow {

constexpr int kShortTokens = 512, kShortChannels = 128;  // at most: what a core keeps in its cache
constexpr int kShortMultiple = 32;                       // d is one of it

struct AttentionShortParams {
  int64_t B = 0, H = 0, T = 0, d = 0;
  bool causal = false;
  float scale = 0;
  // (B, H, T, d) bf16, the last stride 1: q, k, v, and the gradient of o
  const uint16_t *q = nullptr, *k = nullptr, *v = nullptr, *grad_o = nullptr;
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {}, grad_stride[3] = {};  // of B, H, T
  uint16_t* o = nullptr;                                                              // (B, T, H, d)  [forward]
  float* lse = nullptr;  // (B, H, T): log of the sum of exp(scale q k^T)   written forward, read backward
  uint16_t *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;  // (B, T, H, d)  [backward]
};

#ifdef BIFLOW_X86
namespace cpu::amx {
// The heads [begin, end) of B H.
void attention_short(const AttentionShortParams& p, int64_t begin, int64_t end);
void attention_short_backward(const AttentionShortParams& p, int64_t begin, int64_t end);
}  // namespace cpu::amx
#endif
}  // namespace biflow
