#include <algorithm>
#include <climits>
#include <initializer_list>

#include "affine.h"
#include "cuda/affine.cuh"

namespace biflow::cuda {
namespace {

// Elements of a chunk, about. At most, two to four trips of a block; large enough for a flow of 256 tokens of 16
// channels to be one launch, small enough for many waves of blocks above 100 MB, whose last one leaves SMs without
// work.
constexpr int64_t kChunk = 4096;
constexpr int64_t kMaxD = int64_t{1} << 30;  // offsets within a chunk and a row fit 32 bits

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

bool aligned(std::initializer_list<const void*> pointers, int64_t bytes) {
  return std::all_of(pointers.begin(), pointers.end(), [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(std::min<int64_t>(bytes, 16)) == 0;
  });
}

int vector_of(const AffineParams& p) {
  int v = static_cast<int>(16 / std::min(size_of(p.data), size_of(p.net)));
  while (p.D % v != 0) v /= 2;
  return v;
}

AffinePlan make_plan(const AffineParams& p, bool encode) {
  const int64_t v = vector_of(p), vectors = p.T * p.D / v, chunks = divide_up(p.T * p.D, kChunk);
  AffinePlan plan{};
  plan.encode = encode;
  plan.aligned = aligned({p.input, p.output, p.grad_output, p.grad_input}, v * size_of(p.data)) &&
                 aligned({p.params, p.grad_params}, v * size_of(p.net));
  // chunks of about equal size; a multiple of 32 keeps each on the cache lines of its own
  const int64_t chunk = chunks > 1 ? divide_up(divide_up(vectors, chunks), 32) * 32 : vectors;
  plan.chunk = static_cast<uint32_t>(chunk);
  plan.chunks = divide_up(vectors, chunk);
  const int64_t trip = std::max<int64_t>(v, kAffineTrip / (p.data == DType::f64 ? 8 : 4)) / v;  // vectors
  while ((1 << plan.log_lanes) < kAffineThreads && (trip << plan.log_lanes) < chunk) ++plan.log_lanes;
  plan.row = static_cast<uint32_t>(p.D / v);
  plan.by_row = Divisor(plan.row);
  plan.pairs = p.options.layout == Layout::interleaved;
  plan.stride = plan.pairs ? 2 : 1;
  plan.piece[0] = p.options.layout == Layout::shift_scale ? p.D : 0;
  plan.piece[1] = plan.pairs ? v : p.D - plan.piece[0];
  return plan;
}

template <class Data, class Net, class S, int V, bool kBackward>
cudaError_t launch(const AffineParams& p, bool encode, cudaStream_t stream) {
  if constexpr (V * std::min(sizeof(Data), sizeof(Net)) > 16) {
    return cudaErrorInvalidValue;  // vector_of has no such V
  } else {
    const AffinePlan plan = make_plan(p, encode);
    const int64_t blocks = divide_up(p.B * plan.chunks << plan.log_lanes, kAffineThreads);
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    const auto kernel = kBackward ? &affine_backward<Data, Net, S, V> : &affine_forward<Data, Net, S, V>;
    const auto status =
        arch::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kAffineThreads), 0, stream, p, plan);
    if (kBackward || status != cudaSuccess || !p.logdet || plan.chunks == 1) return status;
    const int64_t rows = divide_up(p.B, kAffineThreads / 32);
    return arch::launch(&affine_logdet<S>, dim3(static_cast<unsigned>(rows)), dim3(kAffineThreads), 0, stream, p,
                        plan.chunks);
  }
}

template <class Data, class Net, class S, bool kBackward>
cudaError_t with_vector(const AffineParams& p, bool encode, cudaStream_t stream) {
  switch (vector_of(p)) {
    case 8:
      return launch<Data, Net, S, 8, kBackward>(p, encode, stream);
    case 4:
      return launch<Data, Net, S, 4, kBackward>(p, encode, stream);
    case 2:
      return launch<Data, Net, S, 2, kBackward>(p, encode, stream);
    default:
      return launch<Data, Net, S, 1, kBackward>(p, encode, stream);
  }
}

template <bool kBackward>
int with_types(const AffineParams& p, bool encode, void* s) {
  const auto stream = static_cast<cudaStream_t>(s);
  if (p.D > kMaxD) return cudaErrorInvalidValue;
  if (p.data == DType::f64) return with_vector<double, double, double, kBackward>(p, encode, stream);
  const bool data = p.data == DType::f32, net = p.net == DType::f32;
  if (data && net) return with_vector<float, float, float, kBackward>(p, encode, stream);
  if (data) return with_vector<float, Word16, float, kBackward>(p, encode, stream);
  if (net) return with_vector<Word16, float, float, kBackward>(p, encode, stream);
  return with_vector<Word16, Word16, float, kBackward>(p, encode, stream);
}

}  // namespace

int64_t affine_partials(const AffineParams& p) {
  const int64_t chunks = make_plan(p, true).chunks;
  return chunks > 1 ? p.B * chunks : 0;
}

int affine_encode(const AffineParams& p, void* stream) { return with_types<false>(p, true, stream); }
int affine_decode(const AffineParams& p, void* stream) { return with_types<false>(p, false, stream); }
int affine_encode_backward(const AffineParams& p, void* stream) { return with_types<true>(p, true, stream); }
int affine_decode_backward(const AffineParams& p, void* stream) { return with_types<true>(p, false, stream); }

}  // namespace biflow::cuda
