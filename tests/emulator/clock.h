// What a thread knows to have happened: a vector clock over blocks, warps and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

using Time = uint32_t;

// A thread of the grid: block << 10 | index in the block.
using ThreadId = uint32_t;
inline uint32_t block_of(ThreadId id) { return id >> 10; }
inline uint32_t index_of(ThreadId id) { return id & 1023; }

enum class Scope : uint32_t { thread, warp, block };

// Entry (scope, id) = t: everything the block, warp or thread did before time t is known.
class Clock {
 public:
  bool empty() const { return entries_.empty(); }
  void clear() { entries_.clear(); }

  // Is what `id` (or, by `scope`, somebody of its warp or block) did at `time` known?
  bool knows(ThreadId id, Scope scope, Time time) const {
    return !entries_.empty() && (time < at(Scope::block, id) || (scope <= Scope::warp && time < at(Scope::warp, id)) ||
                                 (scope == Scope::thread && time < at(Scope::thread, id)));
  }

  void learn(Scope scope, ThreadId id, Time time) {
    Clock one;
    one.entries_.push_back({key(scope, id), time});
    learn(one);
  }

  void learn(const Clock& other) {
    if (other.entries_.empty()) return;
    std::vector<Entry> merged;
    merged.reserve(entries_.size() + other.entries_.size());
    auto a = entries_.begin();
    auto b = other.entries_.begin();
    uint64_t block = 0;
    Time block_time = 0;
    while (a != entries_.end() || b != other.entries_.end()) {
      Entry next;
      if (b == other.entries_.end() || (a != entries_.end() && a->first < b->first)) {
        next = *a++;
      } else if (a == entries_.end() || b->first < a->first) {
        next = *b++;
      } else {
        next = {a->first, std::max(a->second, b->second)};
        ++a, ++b;
      }
      // a block's own entry comes first; those of its warps and threads that it covers are dropped
      if (next.first % kKeysOfBlock == 0) {
        block = next.first, block_time = next.second;
      } else if (next.first - next.first % kKeysOfBlock == block && next.second <= block_time) {
        continue;
      }
      merged.push_back(next);
    }
    entries_.swap(merged);
  }

 private:
  using Entry = std::pair<uint64_t, Time>;
  static constexpr uint64_t kKeysOfBlock = 2048;  // the block, 32 warps, 1024 threads

  static uint64_t key(Scope scope, ThreadId id) {
    const uint64_t first = block_of(id) * kKeysOfBlock;
    if (scope == Scope::block) return first;
    return scope == Scope::warp ? first + 1 + index_of(id) / 32 : first + 1024 + index_of(id);
  }

  Time at(Scope scope, ThreadId id) const {
    const uint64_t wanted = key(scope, id);
    const auto found = std::lower_bound(entries_.begin(), entries_.end(), wanted,
                                        [](const Entry& e, uint64_t k) { return e.first < k; });
    return found != entries_.end() && found->first == wanted ? found->second : 0;
  }

  std::vector<Entry> entries_;  // by key
};

}  // namespace emulator
