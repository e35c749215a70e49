// Threads that work on the same samples, in phases: between two phases all of them see all that was written.
//
// A phase has one part for each member. A member does its own part, and also the part of one that has not come: so
// nobody waits for a thread that the operating system keeps from running, and a crew makes progress with any number
// of its members, even one. A member that comes late walks through the phases that are over and joins the current one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/isa.h"

namespace biflow::cpu {

struct CrewPart {  // the last phase in which this part was claimed, done; apart, for others look at `done` only
  alignas(64) std::atomic<uint32_t> claimed{0};
  alignas(64) std::atomic<uint32_t> done{0};
};

// How B samples are divided: groups of samples whose rows are multiplied together, crews that take groups in turn,
// members of a crew that share the columns of every product.
struct Schedule {
  int crews = 1, members = 1;
  int64_t samples = 0, groups = 0;
  CrewPart* parts = nullptr;  // [crews][members], zero before the call
  float* scratch = nullptr;   // [crews][scratch_stride]
  int64_t scratch_stride = 0;

  int workers() const { return crews * members; }
  int64_t group_begin(int64_t g) const { return samples * g / groups; }
  int64_t largest_group() const { return (samples + groups - 1) / groups; }
};

// Groups of at most max_rows rows, one sample at least. Every thread has its own groups if they have enough rows to pay
// for reading all weights, `own_rows`; else threads share the columns of a group, and so the weights.
// `work`: words of weights a row is multiplied with. halves: two members need half as many phases (BlockShape).
inline Schedule make_schedule(int64_t samples, int64_t rows_per_sample, int64_t max_rows, int64_t own_rows,
                              int64_t work, bool halves, int threads) {
  // words times rows that a member must have: less is done before the others know; and with half the phases
  constexpr int64_t kShare = 180 << 10, kShareOfHalves = 90 << 10;
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  Schedule s;
  s.samples = samples;
  const int64_t most = max_rows / rows_per_sample > 1 ? max_rows / rows_per_sample : 1;
  s.groups = (samples + most - 1) / most;
  if (s.groups >= threads || (samples >= threads && samples * rows_per_sample >= own_rows * threads)) {
    s.crews = threads;
    s.groups = round_up(s.groups, threads);  // the same number for each
    if (s.groups > samples) s.groups = samples;
  } else {
    s.crews = static_cast<int>(s.groups);
    s.members = threads / s.crews;
    const int64_t each = samples * rows_per_sample * work / s.crews;
    const int64_t most_members = halves && each >= 2 * kShareOfHalves && each < 2 * kShare ? 2 : each / kShare;
    if (s.members > most_members) s.members = most_members > 1 ? static_cast<int>(most_members) : 1;
  }
  return s;
}

namespace BIFLOW_ISA {

class Member {
 public:
  Member(const Schedule& s, int worker)
      : parts_(s.parts ? s.parts + worker / s.members * s.members : nullptr),
        count_(s.members),
        me_(worker % s.members) {}

  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  int count() const { return count_; }
  int me() const { return me_; }  // for what a member keeps for itself

  // Runs work(part) for every part in [0, count()); returns when all are done. Every member must call the same phases.
  template <class Work>
  void phase(Work&& work) noexcept {  // who threw would leave the others waiting
    if (count_ == 1) return work(0);
    ++now_;
    attempt(me_, work);
    for (int i = 0; i < count_; ++i)
      for (int waited = 0; parts_[i].done.load(std::memory_order_acquire) < now_; ++waited) {
        if (waited % kPatience == kPatience - 1) attempt(i, work);
        if (waited < kSpins)
          pause();
        else
          std::this_thread::yield();
      }
  }

 private:
  static constexpr int kPatience = 32, kSpins = 256;  // pauses of about 40 ns

  template <class Work>
  void attempt(int part, Work&& work) {
    uint32_t before = now_ - 1;
    if (parts_[part].claimed.load(std::memory_order_relaxed) != before) return;
    if (!parts_[part].claimed.compare_exchange_strong(before, now_, std::memory_order_acq_rel)) return;
    work(part);
    parts_[part].done.store(now_, std::memory_order_release);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  CrewPart* parts_;
  int count_, me_;
  uint32_t now_ = 0;
};

}  // namespace BIFLOW_ISA
}  // namespace biflow::cpu
