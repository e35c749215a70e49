#include "arch/arch.cuh"
#include "cuda/status.h"

namespace biflow::cuda {

const char* status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace biflow::cuda
