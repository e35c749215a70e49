// jacobi_update_ as a torch op, for any device: the checks, and the params struct but for the tensors' addresses.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

#include "block_options.h"
#include "jacobi_update.h"
#include "options.h"

namespace biflow {

struct JacobiCall {
  using Tensor = torch::stable::Tensor;

  Tensor x, z, raw, moved;
  JacobiUpdateParams p;

  JacobiCall(const Tensor& x_in, const Tensor& z_in, const Tensor& raw_in, const Tensor& moved_in, int64_t start,
             int64_t stop, bool shift_only, const std::string& layout, const std::string& scale,
             const std::string& clip, double clip_value, const std::string& clip_on, bool flip)
      : x(x_in), z(z_in), raw(raw_in), moved(moved_in) {
    STD_TORCH_CHECK(x.dim() == 3, "jacobi_update: x must be (B, T, D)");
    p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
    check("x", x, {p.B, p.T, p.D});
    check("z", z, {p.B, p.T, p.D});
    check("raw", raw, {p.B, p.T, shift_only ? p.D : 2 * p.D});
    check("moved", moved, {2, p.B});
    STD_TORCH_CHECK(0 <= start && start < stop && stop <= p.T, "jacobi_update: expected 0 <= start < stop <= ", p.T,
                    ", got ", start, " and ", stop);
    p.affine = parse_affine("jacobi_update", layout, scale, clip, clip_value, clip_on, flip);
    if (shift_only) p.affine.scale = ScaleMap::exp;  // its raw scale is 0: sigma = 1
    p.shift_only = shift_only;
    p.start = start, p.stop = stop;
    for (const Tensor* read : {&z, &raw})
      STD_TORCH_CHECK(!overlap(x, *read) && !overlap(moved, *read),
                      "jacobi_update: x and moved must not overlap z or raw");
    STD_TORCH_CHECK(!overlap(x, moved), "jacobi_update: x and moved must not overlap");
  }

 private:
  void check(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) const {
    check_tensor("jacobi_update", what, t, shape, &x);
  }
  static bool overlap(const Tensor& a, const Tensor& b) {
    const auto* p = static_cast<const float*>(a.const_data_ptr());
    const auto* q = static_cast<const float*>(b.const_data_ptr());
    return p < q + b.numel() && q < p + a.numel();
  }
};

}  // namespace biflow
