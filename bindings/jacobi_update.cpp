#include "jacobi_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "jacobi_update_call.h"

namespace {

using torch::stable::Tensor;

void jacobi_update_(Tensor x, Tensor z, Tensor raw, Tensor moved, int64_t start, int64_t stop, bool shift_only,
                    std::string layout, std::string scale, std::string clip, double clip_value, std::string clip_on,
                    bool flip) {
  biflow::JacobiCall call(x, z, raw, moved, start, stop, shift_only, layout, scale, clip, clip_value, clip_on, flip);
  biflow::JacobiUpdateParams& p = call.p;
  p.x = x.mutable_data_ptr<float>();
  p.z = z.const_data_ptr<float>();
  p.raw = raw.const_data_ptr<float>();
  p.moved = moved.mutable_data_ptr<float>();
  constexpr int64_t kGrain = 16384;  // elements a thread takes at least
  const int64_t per_sample = (stop - start) * p.D, grain = 1 + kGrain / (per_sample > 0 ? per_sample : 1);
  torch::stable::parallel_for(0, p.B, grain,
                              [&](int64_t begin, int64_t end) { biflow::cpu::jacobi_update(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("jacobi_update_", TORCH_BOX(&jacobi_update_)); }
