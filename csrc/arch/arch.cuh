// The machine as kernels see it. Kernels include this file and nothing else of CUDA; everything that differs between a
// GPU and the host lies behind it. nvcc gets device.cuh (inline PTX, launches); a host compiler gets emulated.cuh, the
// same names over the emulator in tests/emulator, which runs the same kernel source with a race checker.
// Both sides of each name have a test: tests/emulator/conformance.cu, which runs on a GPU too.
//
// Rules for kernels: shared memory through BIFLOW_SHARED and BIFLOW_DYNAMIC_SHARED; launches through arch::launch;
// masks explicit; no lane returns before a collective or barrier that names it; what lanes exchange through shared
// memory is separated by __syncwarp; bf16 and half are for memory, arithmetic is float (arch/vector.cuh).
#pragma once

#if defined(__CUDACC__)
#include "arch/device.cuh"
#else
#include "arch/emulated.cuh"
#endif
#include "arch/vector.cuh"
