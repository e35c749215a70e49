#include "jacobi_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "block_options.h"

namespace {

using biflow::Tensor;

void jacobi_update_(Tensor x, Tensor z, Tensor raw, Tensor moved, int64_t start, int64_t stop, bool shift_only,
                    std::string layout, std::string scale, std::string clip, double clip_value, std::string clip_on,
                    bool flip) {
  constexpr const char* kOp = "jacobi_update";
  STD_TORCH_CHECK(x.dim() == 3, "jacobi_update: x must be (B, T, D)");
  biflow::JacobiUpdateParams p;
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
  biflow::check_tensor(kOp, "x", x, {p.B, p.T, p.D});
  biflow::check_tensor(kOp, "z", z, {p.B, p.T, p.D});
  biflow::check_tensor(kOp, "raw", raw, {p.B, p.T, shift_only ? p.D : 2 * p.D});
  biflow::check_tensor(kOp, "moved", moved, {2, p.B});
  STD_TORCH_CHECK(0 <= start && start < stop && stop <= p.T, "jacobi_update: expected 0 <= start < stop <= ", p.T,
                  ", got ", start, " and ", stop);
  p.affine = biflow::parse_affine(kOp, layout, scale, clip, clip_value, clip_on, flip);
  if (shift_only) p.affine.scale = biflow::ScaleMap::exp;  // its raw scale is 0: sigma = 1
  p.shift_only = shift_only;
  p.start = start, p.stop = stop;
  p.x = x.mutable_data_ptr<float>();
  p.z = z.const_data_ptr<float>();
  p.raw = raw.const_data_ptr<float>();
  p.moved = moved.mutable_data_ptr<float>();
  const auto overlap = [](const Tensor& a, const Tensor& b) {
    const auto* p = static_cast<const float*>(a.const_data_ptr());
    const auto* q = static_cast<const float*>(b.const_data_ptr());
    return p < q + b.numel() && q < p + a.numel();
  };
  for (const Tensor* read : {&z, &raw})
    STD_TORCH_CHECK(!overlap(x, *read) && !overlap(moved, *read),
                    "jacobi_update: x and moved must not overlap z or raw");
  STD_TORCH_CHECK(!overlap(x, moved), "jacobi_update: x and moved must not overlap");
  constexpr int64_t kGrain = 16384;  // elements a thread takes at least
  const int64_t per_sample = (stop - start) * p.D, grain = 1 + kGrain / (per_sample > 0 ? per_sample : 1);
  torch::stable::parallel_for(0, p.B, grain,
                              [&](int64_t begin, int64_t end) { biflow::cpu::jacobi_update(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("jacobi_update_", TORCH_BOX(&jacobi_update_)); }
