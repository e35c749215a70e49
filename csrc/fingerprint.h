// A number that changes, but for bad luck, when an array changes as a whole: what tells a cache that weights are new.
#pragma once

#include <cstdint>
#include <cstring>

namespace biflow {

constexpr int kFingerprintSamples = 64;

// FNV-1a over up to kFingerprintSamples words of 4 bytes, spread evenly over data[bytes] with both ends; seed chains
// arrays.
inline uint64_t fingerprint(const void* data, int64_t bytes, uint64_t seed) {
  const auto add = [&seed](uint64_t word) { seed = (seed ^ word) * 0x100000001b3ull; };
  const int64_t words = bytes / 4, count = words < kFingerprintSamples ? words : kFingerprintSamples;
  add(static_cast<uint64_t>(bytes));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    const int64_t at = count > 1 ? i * (words - 1) / (count - 1) : 0;
    std::memcpy(&word, static_cast<const char*>(data) + 4 * at, 4);
    add(word);
  }
  return seed;
}

}  // namespace biflow
