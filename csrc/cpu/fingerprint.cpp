// 32 independent lanes of 64 bits, each (lane ^ word) * K rotated: one-to-one in the lane and in the word, so a change
// of one word always shows; the rotation carries a change of high bits to the low ones, where the next product spreads
// it.
#include "fingerprint.h"

#include <cstring>

#include "cpu/simd.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

constexpr int kWords = 32, kStride = kWords * 8, kVectors = kStride / kVectorBytes;
constexpr uint64_t kFactor = 0x9e3779b97f4a7c15ull;  // 2^64 over the golden ratio: odd, its bits well mixed

typedef uint64_t vword __attribute__((vector_size(kVectorBytes)));

template <class T>
inline T mix(T state, T word) {
  state = (state ^ word) * kFactor;
  return (state << 29) | (state >> 35);
}

inline void add(vword* state, const char* data) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    vword word;
    std::memcpy(&word, data + i * kVectorBytes, kVectorBytes);
    state[i] = mix(state[i], word);
  }
}

}  // namespace

void fingerprint(const void* data, int64_t bytes, uint64_t* hash) {
  const char* p = static_cast<const char*>(data);
  vword state[kVectors];
  for (int i = 0; i < kVectors; ++i) state[i] = vword{} + *hash;
  int64_t i = 0;
  for (; i + kStride <= bytes; i += kStride) add(state, p + i);
  if (i < bytes) {
    char rest[kStride] = {};
    std::memcpy(rest, p + i, bytes - i);
    add(state, rest);
  }
  uint64_t words[kWords];
  std::memcpy(words, state, kStride);
  uint64_t sum = mix(*hash, static_cast<uint64_t>(bytes));
  for (uint64_t word : words) sum = mix(sum, word);
  *hash = sum;
}

}  // namespace biflow::cpu::BIFLOW_ISA
