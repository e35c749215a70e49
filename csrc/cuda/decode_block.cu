#include <algorithm>

#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {
namespace {

int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
int padded(int64_t n) { return static_cast<int>(round_up(n, kVectorPad)); }

int64_t rows_of(const DecodeBlockParams& p) { return p.B * (p.condition.guided ? 2 : 1); }

int head_stride(const BlockShape& s) { return static_cast<int>(round_up(s.head_dim, 8)); }
int64_t z_words(const DecodeBlockParams& p) { return p.B * p.shape.tokens * p.shape.channels; }

int64_t act_words(const DecodeBlockParams& p, int64_t elements) {
  return p.shape.precision == Precision::bf16 ? divide_up(elements, 2) : elements;
}

int evaluated(const BlockShape& s) { return s.tokens - (s.start_token ? 0 : 1); }
int prefix_of(const DecodeBlockParams& p) { return evaluated(p.shape) > 0 ? p.condition.prefix_tokens : 0; }

// The buffers that must be zero at the start, the barrier first among them, come first.
int64_t zeroed_words(const DecodeBuffers& at) { return at.lse; }

DecodeState make_state(const DecodeBlockParams& p, const DecodePlan& plan, float* memory) {
  const BlockShape& shape = p.shape;
  const DecodeBuffers at = decode_buffers(p, plan);
  DecodeState s{};
  s.batch = p.B, s.rows = static_cast<int>(rows_of(p));
  s.prefix = prefix_of(p), s.steps = s.prefix + evaluated(shape);
  s.tokens = shape.tokens, s.channels = shape.channels, s.width = shape.width, s.layers = shape.layers;
  s.heads = shape.heads(), s.head_dim = shape.head_dim;
  s.rmsnorm = shape.norm == Norm::rmsnorm, s.swiglu = shape.gate == Gate::swiglu;
  s.qk_norm = shape.qk_norm, s.rope = shape.rope, s.pos_embed = shape.pos_embed;
  s.start_token = shape.start_token, s.shift_only = shape.shift_only;
  s.affine = p.affine, s.condition = p.condition, s.packed = packed_block(shape, Target::cuda), s.plan = plan;
  s.row_groups = static_cast<int>(divide_up(s.rows, kRowTile * plan.row_tiles));
  s.owners = plan.blocks / s.row_groups;
  // blocks read z while others write x: where they are the same, z is a copy, after the other buffers
  s.z = p.z == p.x ? memory + at.words - z_words(p) : p.z;
  s.out = p.x, s.weights = p.packed;
  s.x_stride = padded(shape.width), s.h_stride = padded(shape.mlp_hidden), s.qkv_stride = padded(3 * shape.width);
  s.raw_stride = padded(shape.raw_columns()), s.head_stride = head_stride(shape);
  s.barrier = reinterpret_cast<arch::GridBarrier*>(memory);
  s.x = memory + at.x, s.y = memory + at.y, s.o = memory + at.o, s.h = memory + at.h;
  s.partial = memory + at.partial, s.lse = memory + at.lse, s.qkv = memory + at.qkv, s.raw = memory + at.raw;
  s.cache = memory + at.cache;
  return s;
}

bool is_power_of_two_to(int n, int most) { return n > 0 && n <= most && (n & (n - 1)) == 0; }

bool is_valid(const DecodeBlockParams& p, const DecodePlan& plan) {
  return is_power_of_two_to(plan.row_tiles, 4) && is_power_of_two_to(plan.warps, kDecodeWarps) && plan.splits >= 1 &&
         (plan.splits == 1 || p.shape.head_dim % 8 == 0) && !(stages_rows(plan) && plan.row_tiles > 1) &&
         plan.blocks >= divide_up(rows_of(p), kRowTile * plan.row_tiles) &&
         decode_shared_bytes(p, plan) <= arch::shared_memory_limit();
}

}  // namespace

DecodeMachine decode_machine() {
  return {arch::multiprocessors(), arch::shared_memory_limit(), arch::takes_cooperative_launches()};
}

size_t decode_shared_bytes(const DecodeBlockParams& p, const DecodePlan& plan) {
  return decode_shared(plan, p.shape.precision == Precision::bf16, p.shape.width, p.shape.layers, p.shape.channels)
      .all();
}

DecodePlan decode_plan(const DecodeBlockParams& p, const DecodeMachine& machine) {
  // As measured on an H200 (docs/results.md): joining the splits of 256 tokens takes longer than they save; one tile is
  // faster for 16 rows, two for 64 and 256. Where in between they cross is a guess.
  constexpr int kTokensOfSplit = 256, kRowsOfOneTile = 32, kRowsOfTwo = 512;
  const int64_t rows = rows_of(p), processors = machine.multiprocessors;
  DecodePlan plan;
  plan.persistent = machine.cooperative;
  plan.row_tiles = rows <= kRowsOfOneTile ? 1 : rows <= kRowsOfTwo ? 2 : 4;
  const auto fits = [&] { return decode_shared_bytes(p, plan) <= machine.shared; };
  while (plan.row_tiles > 1 && !fits()) plan.row_tiles /= 2;
  plan.norm_in_place = plan.row_tiles == 1 && rows <= kRowsOfOneTile;
  if (!fits()) plan.norm_in_place = false;
  const int64_t groups = divide_up(rows, kRowTile * plan.row_tiles);
  // more blocks than the widest product has columns for would only make the barriers slower
  const int64_t tiles =
      divide_up(std::max({3 * p.shape.width, p.shape.fc1_rows(), p.shape.raw_columns()}), kFragmentColumns);
  plan.blocks = static_cast<int>(std::max(std::min(processors, groups * tiles), groups));
  if (plan.blocks > processors) plan.persistent = false;

  const int64_t queries = rows * p.shape.heads(), warps = plan.blocks * int64_t{kDecodeWarps};
  while (plan.warps > 1 && queries * plan.warps > warps) plan.warps /= 2;
  if (p.shape.head_dim % 8 == 0 && plan.warps == kDecodeWarps && plan.row_tiles == 1) {
    const int64_t tokens = p.shape.tokens + p.condition.prefix_tokens;
    plan.splits = static_cast<int>(std::max<int64_t>(std::min(plan.blocks / queries, tokens / kTokensOfSplit), 1));
    if (!fits()) plan.splits = 1;
  }
  return plan;
}

DecodeBuffers decode_buffers(const DecodeBlockParams& p, const DecodePlan& plan) {
  const BlockShape& s = p.shape;
  const int64_t rows = rows_of(p), x = rows * padded(s.width);
  const bool split = plan.splits > 1;
  DecodeBuffers at;
  const auto take = [&at](int64_t words) {
    const int64_t start = at.words;
    at.words += round_up(words, kVectorPad);
    return start;
  };
  take(sizeof(arch::GridBarrier) / 4);
  at.x = take(x);
  at.y = take(plan.norm_in_place ? 0 : act_words(p, x));
  at.o = take(split ? 0 : act_words(p, x));
  at.h = take(act_words(p, rows * padded(s.mlp_hidden)));
  at.partial = take(split ? plan.splits * x : 0);
  at.lse = take(split ? plan.splits * rows * s.heads() : 0);
  at.qkv = take(rows * padded(3 * s.width));
  at.raw = take(rows * padded(s.raw_columns()));
  at.cache = take(act_words(p, s.layers * rows * s.heads() * 2 * (prefix_of(p) + s.tokens) * head_stride(s)));
  if (p.z == p.x) at.words += z_words(p);
  return at;
}

int decode_block(const DecodeBlockParams& p, const DecodePlan& plan, float* workspace, int64_t phases, void* stream) {
  if (!is_valid(p, plan)) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  DecodeState s = make_state(p, plan, workspace);
  auto status = arch::taken(cudaMemsetAsync(workspace, 0, 4 * zeroed_words(decode_buffers(p, plan)), on));
  if (status == cudaSuccess && p.z == p.x)
    status = arch::taken(cudaMemcpyAsync(const_cast<float*>(s.z), p.z, 4 * z_words(p), cudaMemcpyDeviceToDevice, on));
  if (status != cudaSuccess) return status;
  const auto launch = [&] {
    return p.shape.precision == Precision::bf16 ? launch_decode<arch::bf16>(s, phases, on)
                                                : launch_decode<float>(s, phases, on);
  };
  status = launch();
  if (status != cudaErrorCooperativeLaunchTooLarge || !plan.persistent) return status;
  s.plan.persistent = false;  // somebody else has a part of the GPU
  return launch();
}

}  // namespace biflow::cuda
