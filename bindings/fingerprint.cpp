#include "fingerprint.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

static int64_t weights_fingerprint(std::vector<torch::stable::Tensor> weights) {
  uint64_t hash = 0;
  for (const auto& w : weights) {
    STD_TORCH_CHECK(w.device().is_cpu(), "weights_fingerprint: expected tensors on the CPU");
    std::vector<int64_t> about = {static_cast<int64_t>(w.scalar_type())};
    for (int64_t i = 0; i < w.dim(); ++i) about.push_back(w.size(i));
    biflow::cpu::fingerprint(about.data(), about.size() * sizeof(int64_t), &hash);
    const auto values = w.is_contiguous() ? w : torch::stable::contiguous(w);
    biflow::cpu::fingerprint(values.const_data_ptr(), values.numel() * values.element_size(), &hash);
  }
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("weights_fingerprint", TORCH_BOX(&weights_fingerprint)); }
