#include "affine_call.h"
#include "cuda.h"

namespace {

using biflow::AffineParams;
namespace cuda = biflow::cuda;

class Cuda : public biflow::Launch {
 public:
  using biflow::Launch::Launch;

  static int64_t partials(const AffineParams& p) { return cuda::affine_partials(p); }

  void forward(const AffineParams& p, bool encode) const {
    check("affine", encode ? cuda::affine_encode(p, stream()) : cuda::affine_decode(p, stream()));
  }
  void backward(const AffineParams& p, bool encode) const {
    check("affine", encode ? cuda::affine_encode_backward(p, stream()) : cuda::affine_decode_backward(p, stream()));
  }
};

using Ops = biflow::AffineOps<Cuda>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(BIFLOW_LIBRARY, BIFLOW_CUDA_KEY, m) {
  m.impl("affine_encode", TORCH_BOX(&Ops::encode));
  m.impl("affine_decode", TORCH_BOX(&Ops::decode));
  m.impl("affine_encode_backward", TORCH_BOX(&Ops::encode_backward));
  m.impl("affine_decode_backward", TORCH_BOX(&Ops::decode_backward));
}
