// What the bindings of CUDA kernels share: the device, stream and memory of one call. Built twice: for torch, and into
// the emulated library of the tests (BIFLOW_EMULATED), where "device memory" is the host's and the emulator must know
// which bytes a kernel may touch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/status.h"
#include "library.h"

#ifdef BIFLOW_EMULATED
#include <exception>

#include "emulator/memory.h"
#else
// Weak: a torch without CUDA has no such function, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace biflow {

// One op's launches on the device of a tensor: makes that device current until destroyed, and uses its current stream.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& on)
#ifdef BIFLOW_EMULATED
  {
    (void)on;
    emulator::forget_memory();
  }
#else
      : guard_(on.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "biflow: expected a torch with CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream_));
  }
#endif

#ifdef BIFLOW_EMULATED
  // Outputs must be complete when the op ends; not where an error is on its way out already.
  ~Launch() noexcept(false) {
    if (std::uncaught_exceptions() == 0) emulator::check_written();
  }
#endif
  Launch(const Launch&) = delete;

  void* stream() const { return stream_; }

  // The memory of a tensor, from its first element to its last, as the kernels use it.
  const void* reads(const torch::stable::Tensor& t) const {
    tell(t, true);
    return t.const_data_ptr();
  }
  void* writes(torch::stable::Tensor& t) const {  // every element, none is read before
    tell(t, false);
    return t.mutable_data_ptr();
  }
  void* updates(torch::stable::Tensor& t) const {
    tell(t, true);
    return t.mutable_data_ptr();
  }
  void* scratch(torch::stable::Tensor& t) const {  // some elements, none is read before it is written
    tell(t, false, true);
    return t.mutable_data_ptr();
  }

  // Raises if a launcher returned an error.
  static void check(const char* op, int status) {
    STD_TORCH_CHECK(status == 0, op, ": CUDA error ", status, ": ", cuda::status_text(status));
  }

 private:
  static void tell(const torch::stable::Tensor& t, bool initialised, bool scratch = false) {
#ifdef BIFLOW_EMULATED
    int64_t elements = t.numel() > 0 ? 1 : 0;
    for (int i = 0; i < t.dim() && elements > 0; ++i) elements += (t.size(i) - 1) * t.stride(i);
    emulator::adopt(t.const_data_ptr(), static_cast<size_t>(elements) * t.element_size(), initialised, scratch);
#else
    (void)t, (void)initialised, (void)scratch;
#endif
  }

  void* stream_ = nullptr;
#ifndef BIFLOW_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace biflow
