// The namespace of the ops and the dispatch key of their CUDA kernels. The tests build the CUDA bindings a second time
// over the emulator, as ops of another namespace that take CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#ifdef BIFLOW_EMULATED
#define BIFLOW_LIBRARY BIFLOW_EMULATED
#define BIFLOW_CUDA_KEY CPU
#else
#define BIFLOW_LIBRARY biflow
#define BIFLOW_CUDA_KEY CUDA
#endif
