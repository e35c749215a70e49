#include "fingerprint.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

static int64_t weights_fingerprint(std::vector<torch::stable::Tensor> weights) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const auto& w : weights) {
    STD_TORCH_CHECK(w.is_contiguous(), "weights_fingerprint: expected contiguous tensors");
    hash = biflow::fingerprint(w.const_data_ptr(), w.numel() * w.element_size(), hash);
  }
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("weights_fingerprint", TORCH_BOX(&weights_fingerprint)); }
