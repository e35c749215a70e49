// Affine coupling with log-determinant: z = (x - b) / sigma and its inverse x = z sigma + b, with gradients.
// a, b are the raw scale and shift the network wrote; order: split by layout -> shift by one token in block order if
// causal (the first token's raw params are 0) -> clip -> sigma = map(a). logdet = -sum log sigma, in nats.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace biflow {

enum class DType : int { f32, bf16, f16, f64 };
enum class Layout : int { scale_shift, shift_scale, interleaved };  // [a | b], [b | a], [a b] per channel
enum class ScaleMap : int { exp, softplus, sigmoid };  // exp(a), softplus(a + 0.5413..), sigmoid(a + 2) + 1e-3
enum class Clip : int { none, hard, tanh };            // a, clamp(a, -c, c), c tanh(a / c)
enum class ClipOn : int { both, scale };               // which of a and b are clipped

struct AffineOptions {
  Layout layout = Layout::scale_shift;
  ScaleMap scale = ScaleMap::exp;
  Clip clip = Clip::none;
  double clip_value = 0;  // c > 0, in the unit of a
  ClipOn clip_on = ClipOn::both;
  bool causal = true;
  bool flip = false;  // block order is reversed token order
};

// All tensors contiguous. B samples, T tokens, D channels. `data` is the dtype of x, z and their gradients, `net` that
// of params and grad_params. f64 goes with f64 only.
struct AffineParams {
  int64_t B = 0, T = 0, D = 0;
  DType data = DType::f32, net = DType::f32;
  AffineOptions options;

  const void* input = nullptr;   // (B, T, D)  x for encode, z for decode
  const void* params = nullptr;  // (B, T, 2D) as the network wrote them
  const bool* mask = nullptr;    // (B, T) or null; false: the token passes through

  void* output = nullptr;     // (B, T, D)  z for encode, x for decode            [forward]
  double* partial = nullptr;  // (B, chunks of a sample) sums of -log sigma       [forward] null: no logdet
  void* logdet = nullptr;     // (B,) f32, or f64 for f64 data                    [forward] null: no logdet

  const void* grad_output = nullptr;  // (B, T, D)                                [backward]
  const void* grad_logdet = nullptr;  // (B,) like logdet, null: zero             [backward]
  void* grad_input = nullptr;         // (B, T, D)                                [backward]
  void* grad_params = nullptr;        // (B, T, 2D)                               [backward]

  // A chunk is the unit of work: whole tokens of one sample, about 8192 elements. It depends on the shape alone, so
  // sums are the same for any number of threads.
  // (Inlined by force: a copy shared by the objects of all instruction sets would run on the wrong CPU.)
  __attribute__((always_inline)) int64_t tokens_per_chunk() const {
    const int64_t n = 8192 / (D > 0 ? D : 1);
    return n >= 16 ? n / 16 * 16 : n > 0 ? n : 1;  // multiples of 16 keep chunks aligned
  }
  __attribute__((always_inline)) int64_t chunks_per_sample() const {
    return (T + tokens_per_chunk() - 1) / tokens_per_chunk();
  }
  __attribute__((always_inline)) int64_t chunks() const { return B * chunks_per_sample(); }
};

namespace cpu {
// Each handles the chunks [begin, end) of p.chunks().
BIFLOW_CPU_KERNEL(affine_encode, (const AffineParams& p, int64_t begin, int64_t end), (p, begin, end))
BIFLOW_CPU_KERNEL(affine_decode, (const AffineParams& p, int64_t begin, int64_t end), (p, begin, end))
BIFLOW_CPU_KERNEL(affine_encode_backward, (const AffineParams& p, int64_t begin, int64_t end), (p, begin, end))
BIFLOW_CPU_KERNEL(affine_decode_backward, (const AffineParams& p, int64_t begin, int64_t end), (p, begin, end))
// Adds the partial sums of every sample, in order, into logdet.
BIFLOW_CPU_KERNEL(affine_logdet, (const AffineParams& p), (p))
}  // namespace cpu

namespace cuda {
// Each enqueues on the stream (a cudaStream_t) of the current device and returns a cudaError_t. No tensor is empty;
// D <= 2^30. `partial` holds affine_partials(p) sums: none (it may be null) where one block takes a whole sample.
int64_t affine_partials(const AffineParams& p);
int affine_encode(const AffineParams& p, void* stream);
int affine_decode(const AffineParams& p, void* stream);
int affine_encode_backward(const AffineParams& p, void* stream);
int affine_decode_backward(const AffineParams& p, void* stream);
}  // namespace cuda
}  // namespace biflow
