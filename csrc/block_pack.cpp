#include <cstring>
#include <vector>

#include "block.h"

namespace biflow {

PackedBlock packed_block(const BlockShape& s, Target target) {
  const bool cpu = target == Target::cpu;
  const int64_t pad = cpu ? kColumnGroup : kVectorPad;
  PackedBlock p;
  int64_t at = 0;
  const auto take = [&at, pad](int64_t n) {
    const int64_t start = at;
    at += round_up(n, pad);
    return start;
  };
  const auto linear = [&take, cpu](int64_t columns, int in, Precision precision) {
    PackedLinear l;
    const bool bf16 = precision == Precision::bf16;
    l.in = in;
    if (cpu) {
      l.columns = static_cast<int>(round_up(columns, bf16 ? kTileColumns : kColumnGroup));
      l.weight = take(l.columns * (bf16 ? round_up(in, kTileDepth) / 2 : in));
    } else {
      const int64_t depth = kFragmentBytes / (bf16 ? 2 : 4);
      l.columns = static_cast<int>(round_up(columns, kFragmentColumns));
      l.weight = take(l.columns / kFragmentColumns * (round_up(in, depth) / depth) * kFragmentWords);
    }
    l.bias = take(l.columns);
    return l;
  };
  const bool swiglu = s.gate == Gate::swiglu, bias = s.norm == Norm::layernorm;
  const int64_t fc1_columns = cpu && swiglu ? 2 * padded_columns(s.mlp_hidden) : s.fc1_rows();
  p.proj_in = linear(s.width, s.channels, Precision::fp32);
  p.first_layer = at;
  at = 0;
  p.layer.norm1_weight = take(s.width);
  if (bias) p.layer.norm1_bias = take(s.width);
  p.layer.qkv = linear(3 * s.width, s.width, s.precision);
  if (s.qk_norm) p.layer.q_norm = take(s.head_dim), p.layer.k_norm = take(s.head_dim);
  p.layer.proj = linear(s.width, s.width, s.precision);
  p.layer.norm2_weight = take(s.width);
  if (bias) p.layer.norm2_bias = take(s.width);
  p.layer.fc1 = linear(fc1_columns, s.width, s.precision);
  p.layer.fc2 = linear(s.width, s.mlp_hidden, s.precision);
  p.layer_size = at;
  at = p.first_layer + s.layers * p.layer_size;
  p.proj_out = linear(s.raw_columns(), s.width, Precision::fp32);
  if (s.pos_embed) p.pos_embed = take(s.tokens * round_up(s.width, pad));
  if (s.start_token) p.start_token = take(s.channels);
  if (s.rope) {
    p.rope_cos = take(static_cast<int64_t>(s.tokens) * (s.head_dim / 2));
    p.rope_sin = take(static_cast<int64_t>(s.tokens) * (s.head_dim / 2));
  }
  p.size = at;
  return p;
}

std::vector<PackedSource> packed_sources(const BlockShape& s, Target target) {
  using Form = PackedSource::Form;
  const bool cpu = target == Target::cpu;
  const PackedBlock p = packed_block(s, target);
  std::vector<PackedSource> list;
  const auto rows = [&](int64_t at, int64_t n, int64_t columns, int64_t stride) {
    list.push_back({at, n, columns, stride, Form::rows});
  };
  const auto row = [&](int64_t at, int64_t n) { rows(at, 1, n, n); };
  const auto linear = [&](const PackedLinear& l, int64_t base, int64_t out, Precision precision, int64_t half = 0) {
    const bool bf16 = precision == Precision::bf16;
    const Form form = cpu ? bf16 ? Form::tiles : Form::panels : bf16 ? Form::fragments_bf16 : Form::fragments;
    list.push_back({base + l.weight, out, l.in, l.columns, form, half});
    list.push_back({base + l.bias, 1, out, out, Form::rows, half});
  };
  const bool bias = s.norm == Norm::layernorm;
  const int64_t rotation = static_cast<int64_t>(s.tokens) * (s.head_dim / 2);
  linear(p.proj_in, 0, s.width, Precision::fp32);
  if (s.pos_embed) rows(p.pos_embed, s.tokens, s.width, round_up(s.width, cpu ? kColumnGroup : kVectorPad));
  if (s.start_token) row(p.start_token, s.channels);
  if (s.rope) row(p.rope_cos, rotation), row(p.rope_sin, rotation);
  for (int j = 0; j < s.layers; ++j) {
    const int64_t base = p.first_layer + j * p.layer_size;
    row(base + p.layer.norm1_weight, s.width);
    if (bias) row(base + p.layer.norm1_bias, s.width);
    linear(p.layer.qkv, base, 3 * s.width, s.precision);
    if (s.qk_norm) row(base + p.layer.q_norm, s.head_dim), row(base + p.layer.k_norm, s.head_dim);
    linear(p.layer.proj, base, s.width, s.precision);
    row(base + p.layer.norm2_weight, s.width);
    if (bias) row(base + p.layer.norm2_bias, s.width);
    linear(p.layer.fc1, base, s.fc1_rows(), s.precision, s.gate == Gate::swiglu ? s.mlp_hidden : 0);
    linear(p.layer.fc2, base, s.width, s.precision);
  }
  linear(p.proj_out, 0, s.raw_columns(), Precision::fp32);
  return list;
}

namespace {

// The packed column of row `r` of a linear layer.
int64_t packed_column(int64_t r, int64_t half) {
  if (half == 0) return r;
  const int64_t i = r < half ? r : r - half;
  return i / kColumnGroup * 2 * kColumnGroup + (r < half ? 0 : kColumnGroup) + i % kColumnGroup;
}

uint16_t to_bf16(float x) {  // to nearest even
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

void put_panels(const PackedSource& to, const float* from, float* packed) {
  const int64_t columns = to.stride;
  for (int64_t r = 0; r < to.rows; ++r) {
    const int64_t c = packed_column(r, to.half), first = c / kPanelColumns * kPanelColumns;
    const int64_t panel = columns - first < kPanelColumns ? columns - first : kPanelColumns;
    float* column = packed + first * to.columns + (c - first);
    for (int64_t k = 0; k < to.columns; ++k) column[k * panel] = from[r * to.columns + k];
  }
}

void put_tiles(const PackedSource& to, const float* from, float* packed) {
  const int64_t tile = round_up(to.columns, kTileDepth) * kColumnGroup;  // values
  for (int64_t r = 0; r < to.rows; ++r) {
    const int64_t c = packed_column(r, to.half);
    char* column = reinterpret_cast<char*>(packed) + 2 * (c / kColumnGroup * tile + c % kColumnGroup * 2);
    for (int64_t k = 0; k < to.columns; ++k) {
      const uint16_t value = to_bf16(from[r * to.columns + k]);
      std::memcpy(column + 2 * (k / 2 * 2 * kColumnGroup + k % 2), &value, sizeof value);
    }
  }
}

}  // namespace

void pack_block(const BlockShape& s, const float* const* source, float* packed) {
  std::memset(packed, 0, sizeof(float) * packed_block(s).size);
  for (const PackedSource& to : packed_sources(s)) {
    const float* from = *source++;
    float* at = packed + to.at;
    if (to.form == PackedSource::Form::panels) {
      put_panels(to, from, at);
    } else if (to.form == PackedSource::Form::tiles) {
      put_tiles(to, from, at);
    } else if (to.half) {
      for (int64_t i = 0; i < to.columns; ++i) at[packed_column(i, to.half)] = from[i];
    } else {
      for (int64_t i = 0; i < to.rows; ++i)
        std::memcpy(at + i * to.stride, from + i * to.columns, sizeof(float) * to.columns);
    }
  }
}

}  // namespace biflow
