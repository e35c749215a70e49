#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda.h"
#include "jacobi_update_call.h"

namespace {

using torch::stable::Tensor;

void jacobi_update_(Tensor x, Tensor z, Tensor raw, Tensor moved, int64_t start, int64_t stop, bool shift_only,
                    std::string layout, std::string scale, std::string clip, double clip_value, std::string clip_on,
                    bool flip) {
  biflow::JacobiCall call(x, z, raw, moved, start, stop, shift_only, layout, scale, clip, clip_value, clip_on, flip);
  biflow::JacobiUpdateParams& p = call.p;
  if (p.B == 0) return;
  const biflow::Launch launch(x);
  p.x = static_cast<float*>(launch.updates(x));
  p.z = static_cast<const float*>(launch.reads(z));
  p.raw = static_cast<const float*>(launch.reads(raw));
  p.moved = static_cast<float*>(launch.writes(moved));
  biflow::Launch::check("jacobi_update", biflow::cuda::jacobi_update(p, launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(BIFLOW_LIBRARY, BIFLOW_CUDA_KEY, m) { m.impl("jacobi_update_", TORCH_BOX(&jacobi_update_)); }
