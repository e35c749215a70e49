// One kernel per kind of defect, and its correct twin (defects_block.cuh, defects_grid.cuh).
// tests/kernels/test_emulator.py asserts that the checker names the line that ends in "// NAME", and that it has
// nothing to say about the twin.
//
//   defects NAME defect|correct [forward|reverse|random]   prints what the emulator says, "no error" or "a NaN"
#include <cmath>
#include <cstring>
#include <map>

#include "emulator/defects_grid.cuh"
#include "emulator/memory.h"

namespace biflow::test {
namespace {

// Leaves values in shared memory, more of it than the others have.
__global__ void fill_shared(float* out) {
  BIFLOW_DYNAMIC_SHARED(bytes);
  BIFLOW_SHARED(float, s, [kThreads]);
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += kThreads) bytes[i] = 0;
  s[t] = 0;
  out[blockIdx.x * kThreads + t] = s[t];
}

// --- one launch -----------------------------------------------------------------------------------------------------

struct Case {
  void (*defect)(Arrays);
  void (*correct)(Arrays);
  uint32_t blocks;
  bool cooperative;
  bool writes_all = false;  // of the output
};

#define CASE(name, ...)                             \
  {                                                 \
    #name, { name<false>, name<true>, __VA_ARGS__ } \
  }
const std::map<std::string, Case> kCases = {
    CASE(missing_syncthreads, 1, false),
    CASE(missing_syncthreads_after_reading, 1, false),
    CASE(missing_syncwarp, 1, false),
    CASE(two_writers, 1, false),
    CASE(many_readers, 1, false),
    CASE(reader_writes, 1, false),
    CASE(uninitialised_shared, 2, false, true),
    CASE(shared_out_of_bounds, 1, false),
    CASE(array_index, 1, false),
    CASE(local_index, 1, false),
    CASE(divergent_barrier, 1, false),
    CASE(barrier_after_return, 1, false),
    CASE(deadlock, 1, false),
    CASE(divergent_collective, 1, false),
    CASE(lane_outside_mask, 1, false),
    CASE(lane_returned, 1, false),
    CASE(copy_not_waited, 1, false),
    CASE(copy_without_barrier, 1, false),
    CASE(copy_into_memory_in_use, 1, false),
    CASE(copy_source_overwritten, 1, false),
    CASE(copy_source_too_late, 1, false),
    CASE(read_out_of_bounds, 2, false),
    CASE(write_out_of_bounds, 2, false),
    CASE(memory_of_the_host, 2, false),
    CASE(misaligned, 1, false),
    CASE(misaligned_store, 1, false),
    CASE(null_pointer, 1, false),
    CASE(undefined_shift, 1, false),
    CASE(signed_overflow, 1, false),
    CASE(division_by_zero, 1, false),
    CASE(uninitialised_global, 2, false, true),
    CASE(unwritten_output, 2, false, true),
    CASE(ldg_of_written, 2, false),
    CASE(missing_grid_sync, 2, true),
    CASE(missing_grid_sync_after_reading, 2, true),
    CASE(missing_second_grid_sync, 2, true),
    CASE(other_block_reads, 2, true),
    CASE(grid_sync_not_cooperative, 2, false),
    CASE(missing_release, 2, true),
    CASE(missing_acquire, 2, true),
    CASE(missing_barrier_after_acquire, 2, true),
    CASE(missing_barrier_before_release, 2, true),
    CASE(livelock, 2, true),
    CASE(release_by_each_thread, 2, true),
    CASE(store_after_release, 3, true),
    CASE(load_after_release, 3, true),
    CASE(missing_syncwarp_after_acquire, 2, true),
    CASE(atomic_and_plain, 1, false),
};

// True if the output, which the kernel writes completely, has a NaN: memory that nobody wrote is filled with them.
bool run(const Case& c, bool correct) {
  Device<float> in(std::vector<float>(2 * kThreads, 1)), out(2 * kThreads);
  Device<uint32_t> flags(std::vector<uint32_t>(2, 0));
  Device<float> unused(3 * kThreads);
  require(arch::launch(fill_shared, dim3(3), dim3(kThreads), 4096, nullptr, unused.get()));
  // what is declared twice keeps its first state: an op that works in place declares its input as its output too
  emulator::adopt(in.get() + 5, 20 * sizeof(float), false);
  emulator::adopt(out.get() + 5, 20 * sizeof(float), true);
  const Arrays arrays{in.get(), out.get(), flags.get()};
  const auto kernel = correct ? c.correct : c.defect;
  const size_t shared = kThreads * sizeof(float);
  if (c.cooperative) {
    require(arch::launch_cooperative(kernel, dim3(c.blocks), dim3(kThreads), shared, nullptr, arrays));
  } else {
    require(arch::launch(kernel, dim3(c.blocks), dim3(kThreads), shared, nullptr, arrays));
  }
  if (!c.writes_all) return false;
  emulator::check_written();
  for (const float v : out.values()) {
    if (std::isnan(v)) return true;
  }
  return false;
}

}  // namespace
}  // namespace biflow::test

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  if (argc > 3) emulator_configure(argv[3][0] == 'f' ? 0 : std::strcmp(argv[3], "reverse") == 0 ? 1 : 2, 3, 0);
  try {
    std::puts(biflow::test::run(biflow::test::kCases.at(argv[1]), std::strcmp(argv[2], "correct") == 0) ? "a NaN"
                                                                                                        : "no error");
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
  return 0;
}
