#include <cstring>
#include <vector>

#include "decode_block.h"

namespace biflow {

PackedBlock packed_block(const BlockShape& s) {
  PackedBlock p;
  int64_t at = 0;
  const auto take = [&at](int64_t n) {
    const int64_t start = at;
    at += padded_columns(n);
    return start;
  };
  const auto linear = [&take](int out, int in) {
    PackedLinear l;
    l.in = in, l.out = out;
    l.weight = take(padded_columns(out) * in);
    l.bias = take(out);
    return l;
  };
  const bool bias = s.norm == Norm::layernorm;
  p.proj_in = linear(s.width, s.channels);
  p.first_layer = at;
  at = 0;
  p.layer.norm1_weight = take(s.width);
  if (bias) p.layer.norm1_bias = take(s.width);
  p.layer.qkv = linear(3 * s.width, s.width);
  if (s.qk_norm) p.layer.q_norm = take(s.head_dim), p.layer.k_norm = take(s.head_dim);
  p.layer.proj = linear(s.width, s.width);
  p.layer.norm2_weight = take(s.width);
  if (bias) p.layer.norm2_bias = take(s.width);
  p.layer.fc1 = linear(s.fc1_columns(), s.width);
  p.layer.fc2 = linear(s.width, s.mlp_hidden);
  p.layer_size = at;
  at = p.first_layer + s.layers * p.layer_size;
  p.proj_out = linear(s.raw_columns(), s.width);
  if (s.pos_embed) p.pos_embed = take(s.tokens * padded_columns(s.width));
  if (s.start_token) p.start_token = take(s.channels);
  if (s.rope) {
    p.rope_cos = take(static_cast<int64_t>(s.tokens) * (s.head_dim / 2));
    p.rope_sin = take(static_cast<int64_t>(s.tokens) * (s.head_dim / 2));
  }
  p.size = at;
  return p;
}

namespace {

// One tensor of the state_dict: `rows` rows of `columns`, stored row by row at `at` with `stride`, or as panels.
struct Source {
  int64_t at, rows, columns, stride;
  bool panels;
};

std::vector<Source> sources(const BlockShape& s) {
  const PackedBlock p = packed_block(s);
  std::vector<Source> list;
  const auto rows = [&](int64_t at, int64_t n, int64_t columns, int64_t stride) {
    list.push_back({at, n, columns, stride, false});
  };
  const auto row = [&](int64_t at, int64_t n) { rows(at, 1, n, n); };
  const auto linear = [&](const PackedLinear& l, int64_t base) {
    list.push_back({base + l.weight, l.out, l.in, 0, true});
    row(base + l.bias, l.out);
  };
  const bool bias = s.norm == Norm::layernorm;
  const int64_t rotation = static_cast<int64_t>(s.tokens) * (s.head_dim / 2);
  linear(p.proj_in, 0);
  if (s.pos_embed) rows(p.pos_embed, s.tokens, s.width, padded_columns(s.width));
  if (s.start_token) row(p.start_token, s.channels);
  if (s.rope) row(p.rope_cos, rotation), row(p.rope_sin, rotation);
  for (int j = 0; j < s.layers; ++j) {
    const int64_t base = p.first_layer + j * p.layer_size;
    row(base + p.layer.norm1_weight, s.width);
    if (bias) row(base + p.layer.norm1_bias, s.width);
    linear(p.layer.qkv, base);
    if (s.qk_norm) row(base + p.layer.q_norm, s.head_dim), row(base + p.layer.k_norm, s.head_dim);
    linear(p.layer.proj, base);
    row(base + p.layer.norm2_weight, s.width);
    if (bias) row(base + p.layer.norm2_bias, s.width);
    linear(p.layer.fc1, base);
    linear(p.layer.fc2, base);
  }
  linear(p.proj_out, 0);
  return list;
}

}  // namespace

int64_t packed_sources(const BlockShape& s) { return static_cast<int64_t>(sources(s).size()); }

int64_t packed_source_size(const BlockShape& s, int64_t index) {
  const Source source = sources(s)[index];
  return source.rows * source.columns;
}

void pack_block(const BlockShape& s, const float* const* source, float* packed) {
  std::memset(packed, 0, sizeof(float) * packed_block(s).size);
  for (const Source& to : sources(s)) {
    const float* from = *source++;
    if (!to.panels) {
      for (int64_t i = 0; i < to.rows; ++i)
        std::memcpy(packed + to.at + i * to.stride, from + i * to.columns, sizeof(float) * to.columns);
      continue;
    }
    const int64_t columns = padded_columns(to.rows);  // a row of the weight is a column of the panels
    for (int64_t c = 0; c < to.rows; ++c) {
      const int64_t first = c / kPanelColumns * kPanelColumns;
      const int64_t panel = columns - first < kPanelColumns ? columns - first : kPanelColumns;
      float* column = packed + to.at + first * to.columns + (c - first);
      for (int64_t k = 0; k < to.columns; ++k) column[k * panel] = from[c * to.columns + k];
    }
  }
}

}  // namespace biflow
