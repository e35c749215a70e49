#include <algorithm>
#include <climits>
#include <initializer_list>

#include "cuda/jacobi_update.cuh"

namespace biflow::cuda {
namespace {

constexpr int64_t kLeast = 4096;    // elements of a chunk, where a window has more than one
constexpr int64_t kMost = 1 << 20;  // vectors of a chunk: places within it and a row fit 31 bits
constexpr int64_t kMaxD = int64_t{1} << 29;

int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

int vector_of(const JacobiUpdateParams& p) { return p.D % 4 == 0 ? 4 : p.D % 2 == 0 ? 2 : 1; }

JacobiPlan make_plan(const JacobiUpdateParams& p) {
  const int64_t v = vector_of(p);
  JacobiPlan plan{};
  plan.aligned = true;
  for (const void* data :
       {static_cast<const void*>(p.x), static_cast<const void*>(p.z), static_cast<const void*>(p.raw)})
    plan.aligned = plan.aligned && reinterpret_cast<uintptr_t>(data) % (4 * v) == 0;
  plan.count = (p.stop - p.start) * p.D / v;
  plan.first = p.affine.flip ? p.T - p.stop : p.start;
  // as many blocks as keep the device busy: more would only meet in more atomics, after a launch that clears
  const int64_t wanted = divide_up(4 * arch::multiprocessors(), p.B);
  const int64_t chunks = std::max(std::min(wanted, divide_up(plan.count * v, kLeast)), divide_up(plan.count, kMost));
  const int64_t chunk = chunks > 1 ? divide_up(divide_up(plan.count, chunks), 32) * 32 : plan.count;
  plan.chunk = static_cast<uint32_t>(chunk);
  plan.chunks = divide_up(plan.count, chunk);
  while ((1 << plan.log_lanes) < kJacobiThreads && ((plan.chunks > 1) || (1 << plan.log_lanes) < chunk))
    ++plan.log_lanes;
  plan.row = static_cast<uint32_t>(p.D / v);
  plan.by_row = Divisor(plan.row);
  const auto d = static_cast<uint32_t>(p.D);
  plan.columns = p.shift_only ? d : 2 * d;
  plan.pairs = !p.shift_only && p.affine.layout == Layout::interleaved;
  plan.stride = plan.pairs ? 2 : 1;
  const bool shift_first = p.shift_only || p.affine.layout == Layout::shift_scale;
  plan.piece[0] = !plan.pairs && shift_first ? d : 0;
  plan.piece[1] = plan.pairs ? static_cast<uint32_t>(v) : shift_first ? 0 : d;
  return plan;
}

template <int V>
cudaError_t launch(const JacobiUpdateParams& p, const JacobiPlan& plan, cudaStream_t stream) {
  const int64_t blocks = divide_up(p.B * plan.chunks << plan.log_lanes, kJacobiThreads);
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  return arch::launch(&jacobi_step<V>, dim3(static_cast<unsigned>(blocks)), dim3(kJacobiThreads), 0, stream, p, plan);
}

}  // namespace

int jacobi_update(const JacobiUpdateParams& p, void* s) {
  const auto stream = static_cast<cudaStream_t>(s);
  if (p.D > kMaxD || p.B > INT_MAX) return cudaErrorInvalidValue;
  const JacobiPlan plan = p.D > 0 ? make_plan(p) : JacobiPlan{};
  if (p.D == 0 || plan.chunks > 1) {
    const auto blocks = static_cast<unsigned>(divide_up(2 * p.B, kJacobiThreads));
    const auto status = arch::launch(&jacobi_clear, dim3(blocks), dim3(kJacobiThreads), 0, stream, p.moved, 2 * p.B);
    if (p.D == 0 || status != cudaSuccess) return status;
  }
  switch (vector_of(p)) {
    case 4:
      return launch<4>(p, plan, stream);
    case 2:
      return launch<2>(p, plan, stream);
    default:
      return launch<1>(p, plan, stream);
  }
}

}  // namespace biflow::cuda
