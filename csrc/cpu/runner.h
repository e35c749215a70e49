// How a kernel of crews is run: the memory of a crew, and what a worker does of the schedule.
#pragma once

#include <type_traits>

#include "block.h"
#include "cpu/crew.h"
#include "cpu/linear.h"
#include "cpu/linear_bf16.h"

namespace biflow::cpu::BIFLOW_ISA {

// Pieces of one array, each on a 64-byte boundary; counts while there is no array.
class Scratch {
 public:
  explicit Scratch(float* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t n) {
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

// An op that runs a Runner<P> over groups of samples: Runner(params, schedule, scratch, member), scratch_used(),
// clear() and run(first sample, samples). P follows from the precision of params.shape.
template <template <class> class Runner, class Params>
void with_precision(const Params& p, const Schedule& s, int worker, int64_t* scratch_floats) {
  Member member(s, worker);
  const auto run = [&](auto* type) {
    using R = std::remove_pointer_t<decltype(type)>;
    if (scratch_floats != nullptr) {
      *scratch_floats = R(p, s, Scratch(nullptr), member).scratch_used();
      return;
    }
    const int crew = worker / s.members;
    R runner(p, s, Scratch(s.scratch + crew * s.scratch_stride), member);
    runner.clear();
    for (int64_t g = crew; g < s.groups; g += s.crews)
      runner.run(s.group_begin(g), s.group_begin(g + 1) - s.group_begin(g));
  };
  if (p.shape.precision == Precision::bf16)
    run(static_cast<Runner<Bf16>*>(nullptr));
  else
    run(static_cast<Runner<Fp32>*>(nullptr));
}

// Floats of scratch that one crew needs.
template <template <class> class Runner, class Params>
void crew_scratch(const Params& p, const Schedule& s, int64_t* floats) {
  with_precision<Runner>(p, s, 0, floats);
}

// What `worker` does of the schedule.
template <template <class> class Runner, class Params>
void run_worker(const Params& p, const Schedule& s, int worker) {
  with_precision<Runner>(p, s, worker, nullptr);
}

}  // namespace biflow::cpu::BIFLOW_ISA
