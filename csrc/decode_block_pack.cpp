#include <cstring>

#include "decode_block.h"

namespace biflow {

void pack_block(const BlockShape& s, const float* const* source, float* packed) {
  const PackedBlock p = packed_block(s);
  std::memset(packed, 0, sizeof(float) * p.size);
  const auto linear = [&](const PackedLinear& l) {
    const float* weight = *source++;  // (out, in)
    const int64_t columns = padded_columns(l.out);
    for (int64_t c = 0; c < l.out; ++c) {
      const int64_t first = c / kPanelColumns * kPanelColumns;
      const int64_t panel = columns - first < kPanelColumns ? columns - first : kPanelColumns;
      float* to = packed + l.weight + first * l.in + (c - first);
      for (int64_t k = 0; k < l.in; ++k) to[k * panel] = weight[c * l.in + k];
    }
    std::memcpy(packed + l.bias, *source++, sizeof(float) * l.out);
  };
  const auto rows = [&](int64_t at, int n, int columns, int stride) {
    const float* from = *source++;
    for (int64_t i = 0; i < n; ++i) std::memcpy(packed + at + i * stride, from + i * columns, sizeof(float) * columns);
  };
  for_each_weight(s, p, linear, rows);
}

}  // namespace biflow
