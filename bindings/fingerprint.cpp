#include "fingerprint.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "block_options.h"

static int64_t weights_fingerprint(std::vector<torch::stable::Tensor> weights) {
  const int64_t count = static_cast<int64_t>(weights.size());
  std::vector<torch::stable::Tensor> values;
  int64_t size = 0;
  for (const auto& w : weights) {
    STD_TORCH_CHECK(w.device().is_cpu(), "weights_fingerprint: expected tensors on the CPU");
    values.push_back(w.is_contiguous() ? w : torch::stable::contiguous(w));
    size += w.numel() * w.element_size();
  }
  std::vector<uint64_t> hashes(count, 0);  // of each tensor: its dtype, shape and bytes
  const auto hash_tensors = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& v = values[i];
      std::vector<int64_t> about = {static_cast<int64_t>(v.scalar_type())};
      for (int64_t d = 0; d < v.dim(); ++d) about.push_back(v.size(d));
      biflow::cpu::fingerprint(about.data(), about.size() * sizeof(int64_t), &hashes[i]);
      biflow::cpu::fingerprint(v.const_data_ptr(), v.numel() * v.element_size(), &hashes[i]);
    }
  };
  constexpr int64_t kOneThread = 256 << 10;  // bytes that a thread reads before a second one would have begun
  if (size <= kOneThread || biflow::contention().threads() == 1)
    hash_tensors(0, count);
  else
    torch::stable::parallel_for(0, count, 1, hash_tensors);
  uint64_t hash = 0;
  biflow::cpu::fingerprint(hashes.data(), count * sizeof(uint64_t), &hash);
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(biflow, CPU, m) { m.impl("weights_fingerprint", TORCH_BOX(&weights_fingerprint)); }
