// Device memory, as bindings/cuda.h and the emulated CUDA runtime declare it. Kernels may touch no other memory.
#pragma once

#include <cstddef>

namespace emulator {

// Forgets what was declared.
void forget_memory();

// Declares [p, p + bytes). Memory that is not initialised must be written before it is read (it is filled with 0xFF)
// and, if check_written() is asked and it is not `scratch`, completely. Bytes that are declared already keep their state.
void adopt(const void* p, size_t bytes, bool initialised, bool scratch = false);

// Forgets one range that was declared as a whole.
void disown(const void* p);

// The host wrote these bytes.
void wrote(const void* p, size_t bytes);

// Throws Error if bytes that were declared as not initialised, scratch aside, are not written by now (checked builds).
void check_written();

}  // namespace emulator
