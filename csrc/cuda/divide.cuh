// Division of indices by a number known only at launch.
#pragma once

#include <cstdint>

#include "arch/arch.cuh"

namespace biflow::cuda {

// n / d and n % d for n < 2^31, 0 < d < 2^31 (Granlund and Montgomery, 1994): a high product, an addition and a shift
// where the machine's own sequence is about 25 instructions. With 2^(s-1) < d <= 2^s, floor(2^(32+s) / d) + 1 is wrong
// by less than 2^-31 n / d, which never reaches the next integer; its bit 32 is the addition of n.
class Divisor {
 public:
  Divisor() : Divisor(1) {}
  explicit Divisor(uint32_t d) : divisor_(d) {
    while ((uint64_t{1} << shift_) < d) ++shift_;
    factor_ = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - d) / d + 1);
  }

  BIFLOW_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * factor_ >> 32) + n) >> shift_;
  }
  BIFLOW_DEVICE uint32_t rest(uint32_t n, uint32_t quotient) const { return n - quotient * divisor_; }

 private:
  uint32_t divisor_, factor_, shift_ = 0;
};

}  // namespace biflow::cuda
