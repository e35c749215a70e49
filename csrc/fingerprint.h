// A number that changes, but for bad luck, when an array changes: what tells a cache that weights are new. It reads
// every byte, at the speed of memory.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace biflow::cpu {
// hash = a hash of data[bytes] and the old hash, which so chains arrays; the same number on every instruction set.
BIFLOW_CPU_KERNEL(fingerprint, (const void* data, int64_t bytes, uint64_t* hash), (data, bytes, hash))
}  // namespace biflow::cpu
