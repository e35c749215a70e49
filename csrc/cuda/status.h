// What launchers return: a cudaError_t as int, 0 for success.
#pragma once

namespace biflow::cuda {

const char* status_text(int status);

}  // namespace biflow::cuda
