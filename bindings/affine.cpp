#include "affine_call.h"

namespace {

using biflow::AffineParams;
using torch::stable::Tensor;

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}

  const void* reads(const Tensor& t) const { return t.const_data_ptr(); }
  void* writes(Tensor& t) const { return t.mutable_data_ptr(); }

  static int64_t partials(const AffineParams& p) { return p.chunks(); }

  void forward(const AffineParams& p, bool encode) const {
    run(p, encode ? &biflow::cpu::affine_encode : &biflow::cpu::affine_decode);
    if (p.logdet) biflow::cpu::affine_logdet(p);
  }
  void backward(const AffineParams& p, bool encode) const {
    run(p, encode ? &biflow::cpu::affine_encode_backward : &biflow::cpu::affine_decode_backward);
  }

 private:
  static void run(const AffineParams& p, void (*kernel)(const AffineParams&, int64_t, int64_t)) {
    constexpr int64_t kGrain = 4;  // chunks a thread takes at least, about 32K elements
    torch::stable::parallel_for(0, p.chunks(), kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
};

using Ops = biflow::AffineOps<Cpu>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) {
  m.impl("affine_encode", TORCH_BOX(&Ops::encode));
  m.impl("affine_decode", TORCH_BOX(&Ops::decode));
  m.impl("affine_encode_backward", TORCH_BOX(&Ops::encode_backward));
  m.impl("affine_decode_backward", TORCH_BOX(&Ops::decode_backward));
}
