#include "cuda/decode_block.cuh"

namespace biflow::cuda {

template cudaError_t launch_decode<float>(const DecodeState&, int64_t, cudaStream_t);

}  // namespace biflow::cuda
