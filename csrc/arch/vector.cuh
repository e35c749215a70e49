// Elements in memory and in registers: loads and stores of up to 16 bytes, conversions. The same code on both sides.
#pragma once

#include <cstdint>
#include <cstring>

namespace biflow::arch {

using bf16 = __nv_bfloat16;
using half = __half;

BIFLOW_DEVICE float to_float(float v) { return v; }
BIFLOW_DEVICE float to_float(bf16 v) { return __bfloat162float(v); }
BIFLOW_DEVICE float to_float(half v) { return __half2float(v); }

template <class T>
BIFLOW_DEVICE T from_float(float v);
template <>
BIFLOW_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
BIFLOW_DEVICE bf16 from_float<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
BIFLOW_DEVICE half from_float<half>(float v) {
  return __float2half(v);
}

// N bytes that move as one access.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// n elements of T in registers. load and store take 16 bytes an access where sizeof(T) n allows it: `p` must be aligned
// to min(16, sizeof(T) n) bytes.
template <class T, int n>
struct Vector {
  static constexpr int kBytes = sizeof(T) * n;
  static constexpr int kAccess = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes % kAccess == 0 && (kAccess & (kAccess - 1)) == 0, "a power of two of bytes, or 16-byte pieces");
  using word = typename Word<kAccess>::type;

  T v[n];

  BIFLOW_DEVICE static Vector load(const T* p) {
    Vector r;
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) {
      const word w = reinterpret_cast<const word*>(p)[i];
      memcpy(reinterpret_cast<unsigned char*>(r.v) + i * kAccess, &w, kAccess);
    }
    return r;
  }

  BIFLOW_DEVICE void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) arch::store_word(reinterpret_cast<word*>(p) + i, piece(i));
  }

  // To global memory, in accesses that stay whole.
  BIFLOW_DEVICE void store_global(T* p) const {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) arch::store_global(reinterpret_cast<word*>(p) + i, piece(i));
  }

 private:
  BIFLOW_DEVICE word piece(int i) const {
    word w;
    memcpy(&w, reinterpret_cast<const unsigned char*>(v) + i * kAccess, kAccess);
    return w;
  }
};

// Two elements in one register, the first in the low half: what mma fragments hold.
template <class T>
BIFLOW_DEVICE uint32_t pack(float low, float high);
template <>
BIFLOW_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  uint32_t r;
  memcpy(&r, &v, 4);
  return r;
}
template <>
BIFLOW_DEVICE uint32_t pack<half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  uint32_t r;
  memcpy(&r, &v, 4);
  return r;
}

}  // namespace biflow::arch
