#include <algorithm>

#include "cuda/attention.cuh"

namespace biflow::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t query_tiles(const AttentionParams& p, int row_tiles, int warps) {
  return ceil_div(p.Tq, 16 * row_tiles * warps);
}

size_t tile_bytes(const AttentionParams& p) { return size_t{2} * kKeys * p.d * 2; }

template <class T, int d, int kRowTiles>
int launch(const AttentionParams& p, const AttentionPlan& plan, void* stream) {
  return arch::launch(attention_kernel<T, d, kRowTiles>, dim3(static_cast<unsigned>(p.B * p.H * plan.blocks)),
                      dim3(32 * plan.warps), plan.stages * tile_bytes(p), static_cast<cudaStream_t>(stream), p, plan);
}

template <class T>
int launch(const AttentionParams& p, const AttentionPlan& plan, void* stream) {
  const bool two = plan.row_tiles == 2;
  if (p.d == 32) return two ? launch<T, 32, 2>(p, plan, stream) : launch<T, 32, 1>(p, plan, stream);
  if (p.d == 64) return two ? launch<T, 64, 2>(p, plan, stream) : launch<T, 64, 1>(p, plan, stream);
  return launch<T, 128, 1>(p, plan, stream);
}

}  // namespace

AttentionPlan attention_plan(const AttentionParams& p) {
  AttentionPlan plan;
  const int64_t heads = p.B * p.H, processors = arch::multiprocessors();
  // Two tiles of rows use every byte of keys and values twice; one tile makes twice as many warps.
  plan.row_tiles = p.d <= 64 && heads * query_tiles(p, 2, 4) >= 2 * processors ? 2 : 1;
  while (plan.warps > 1 && query_tiles(p, plan.row_tiles, plan.warps / 2) == 1) plan.warps /= 2;
  const int64_t keys = std::max<int64_t>(ceil_div(p.Tk, kKeys), 1);
  const size_t bytes = keys * tile_bytes(p), limit = arch::shared_memory_limit();
  const bool resident = keys <= kStages || bytes <= limit;
  plan.stages = static_cast<int>(resident ? keys : kStages);
  // Eight warps where only one block fits a multiprocessor, and where every block has to norm and turn all keys.
  const bool large = resident ? 2 * bytes > limit : p.k_norm != nullptr || p.cos != nullptr;
  if (large && heads * query_tiles(p, plan.row_tiles, 8) >= processors) plan.warps = 8;
  const int64_t turns = query_tiles(p, plan.row_tiles, plan.warps);
  // turns of a block, for at least four rounds of blocks
  const int64_t share = resident ? std::max<int64_t>(heads * turns / (4 * processors), 1) : 1;
  plan.blocks = static_cast<int>(ceil_div(turns, share));
  return plan;
}

int attention_forward(const AttentionParams& p, const AttentionPlan& plan, void* stream) {
  const bool warps = plan.warps == 1 || plan.warps == 2 || plan.warps == 4 || plan.warps == 8;
  const bool rows = plan.row_tiles == 1 || (plan.row_tiles == 2 && p.d <= 64);
  if (!warps || !rows || (p.d != 32 && p.d != 64 && p.d != 128)) return cudaErrorInvalidValue;
  const int64_t turns = query_tiles(p, plan.row_tiles, plan.warps);
  const bool resident = plan.stages >= ceil_div(p.Tk, kKeys);
  if (plan.stages < 1 || plan.blocks < 1 || plan.blocks > turns ||
      (!resident && (plan.stages < kStages || plan.blocks < turns)) || p.B * p.H * plan.blocks >= int64_t{1} << 31 ||
      plan.stages * tile_bytes(p) > arch::shared_memory_limit())
    return cudaErrorInvalidValue;
  return p.bf16 ? launch<arch::bf16>(p, plan, stream) : launch<arch::half>(p, plan, stream);
}

}  // namespace biflow::cuda
