#include "cuda/decode_block.cuh"

namespace biflow::cuda {

template cudaError_t launch_decode<arch::bf16>(const DecodeState&, int64_t, cudaStream_t);

}  // namespace biflow::cuda
