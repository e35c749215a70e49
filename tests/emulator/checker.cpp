// Races, bounds, uninitialised reads: every access of a kernel against the shadow of its bytes.
//
// Two accesses to one byte, one of them a write, are ordered if they are of one thread, or a barrier of the block, a
// __syncwarp of the warp, a grid barrier or release -> flag -> acquire lies between them. Barriers advance `now`, and a
// barrier orders all that its threads did before its time, so the test is a comparison of times.
#include <cstring>

#include "emulator/machine.h"
#include "emulator/shadow.h"

namespace emulator {
namespace {

Scope scope_of(uint32_t reader) { return static_cast<Scope>(reader >> Cell::kScopeShift & 3); }

uint32_t with_scope(uint32_t reader, Scope scope) {
  return (reader & ~(3u << Cell::kScopeShift)) | static_cast<uint32_t>(scope) << Cell::kScopeShift;
}

// Did what `id` (or, by `scope`, somebody of its warp or block) did at `time` happen before what `thread` does now?
bool ordered(ThreadId id, Scope scope, Time time, const Thread& thread) {
  if (time < grid.synced || (scope == Scope::thread && id == thread.id)) return true;
  const Block& block = *thread.block;
  const Warp& warp = block.warps[thread.index / 32];
  if (block_of(id) == block.linear) {
    if (time < block.synced) return true;
    if (scope <= Scope::warp && index_of(id) / 32 == thread.index / 32 && time < warp.synced) return true;
  }
  return thread.acquired.knows(id, scope, time) || warp.acquired.knows(id, scope, time) ||
         block.acquired.knows(id, scope, time);
}

struct Place {
  const void* p;
  size_t bytes;
  const Thread& thread;
  const void* pc;
  const Location* at;
  Time alive_since;  // what was written there before does not count
};

constexpr ThreadId kNobody = ~0u;

[[noreturn]] __attribute__((noinline)) void report(const char* what, const Place& place, size_t byte,
                                                   ThreadId other = kNobody) {
  const char* p = static_cast<const char*>(place.p) + byte;
  std::string text = std::string(what) + ": " + std::to_string(place.bytes) + " bytes at " +
                     (place.at != nullptr ? text_of(*place.at) : source_of(place.pc)) + ", " + memory_text(p);
  if (other != kNobody) text += "; the other is thread " + thread_text(other);
  if (&place.thread != current) text += "; of lane " + std::to_string(place.thread.index % 32);
  fail(text);
}

bool is_atomic(Access a) { return a == Access::atomic_load || a == Access::atomic_store || a == Access::atomic_update; }
bool is_read(Access a) { return a == Access::read || a == Access::atomic_load; }

void record_read(Cell& cell, bool atomic, const Thread& thread) {
  const uint32_t me = thread.id | (atomic ? Cell::kAtomic : 0);
  if (cell.read[0] < grid.synced) {  // none, or before all that matters
    cell.read[0] = now, cell.reader[0] = me;
    cell.read[1] = 0;
    return;
  }
  if (block_of(cell.reader[0] & Cell::kIdMask) != block_of(thread.id)) {
    std::swap(cell.read[0], cell.read[1]);
    std::swap(cell.reader[0], cell.reader[1]);
    if (cell.read[0] < grid.synced || block_of(cell.reader[0] & Cell::kIdMask) != block_of(thread.id)) {
      cell.read[0] = now, cell.reader[0] = me;
      return;
    }
  }
  const uint32_t last = cell.reader[0];
  const ThreadId id = last & Cell::kIdMask;
  Scope scope = scope_of(last);
  if (ordered(id, scope, cell.read[0], thread)) {
    scope = Scope::thread;
  } else if (scope < Scope::block) {
    scope = index_of(id) / 32 == thread.index / 32 ? Scope::warp : Scope::block;
  }
  // an atomic read after an unordered plain one counts as plain: only both being atomic excuses an atomic write
  const bool plain = !atomic || (scope != Scope::thread && !(last & Cell::kAtomic));
  cell.read[0] = now;
  cell.reader[0] = with_scope(plain ? thread.id : me, scope);
}

void check_cell(Cell& cell, Access access, const Place& place, size_t byte) {
  const Thread& thread = place.thread;
  if (cell.written == Cell::kNone) {
    if (is_exempt(static_cast<const char*>(place.p) + byte)) return;
    report(is_read(access) ? "out of bounds read" : "out of bounds write", place, byte);
  }
  if (cell.written < place.alive_since) cell = {Cell::kUninitialised, 0, {0, 0}, {0, 0}};
  if (access == Access::copy_landed) {
    cell = {now, thread.id, {0, 0}, {0, 0}};
    return;
  }
  const ThreadId writer = cell.writer & Cell::kIdMask;
  if (cell.writer & Cell::kInFlight) {
    report(is_read(access) ? "read before cp_async_wait" : "write under a cp_async", place, byte, writer);
  }
  if (cell.written == Cell::kUninitialised && (is_read(access) || access == Access::atomic_update)) {
    report("uninitialised read", place, byte);
  }
  const bool atomic = is_atomic(access);
  if (!(atomic && (cell.writer & Cell::kAtomic)) && !ordered(writer, Scope::thread, cell.written, thread)) {
    report(is_read(access) ? "race, read after write" : "race, write after write", place, byte, writer);
  }
  if (is_read(access)) {
    record_read(cell, atomic, thread);
    return;
  }
  for (int i = 0; i < 2; ++i) {
    if (cell.read[i] == 0 || (atomic && (cell.reader[i] & Cell::kAtomic))) continue;
    const ThreadId reader = cell.reader[i] & Cell::kIdMask;
    if (!ordered(reader, scope_of(cell.reader[i]), cell.read[i], thread)) {
      report("race, write after read", place, byte, reader);
    }
  }
  if (atomic) {
    cell.written = now;
    cell.writer = thread.id | Cell::kAtomic;
  } else {
    cell = {now, thread.id | (access == Access::copy_issued ? Cell::kInFlight : 0), {0, 0}, {0, 0}};
  }
}

// A cell as words, which compare and copy faster.
struct Words {
  uint64_t w[3];
  static_assert(sizeof(w) == sizeof(Cell));
  explicit Words(const Cell& cell) { std::memcpy(w, &cell, sizeof(w)); }
  bool operator==(const Words& o) const { return ((w[0] ^ o.w[0]) | (w[1] ^ o.w[1]) | (w[2] ^ o.w[2])) == 0; }
  void copy_to(Cell* cell) const { std::memcpy(static_cast<void*>(cell), w, sizeof(w)); }
};

}  // namespace

void check(const void* p, size_t bytes, Access access, const Thread& thread, const void* pc, const Location* at) {
  const Block& block = *thread.block;
  const bool shared = static_cast<size_t>(static_cast<const unsigned char*>(p) - block.shared) < kRoomBytes;
  const Place place{p, bytes, thread, pc, at, shared ? block.started : 0};
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (size_t i = 0; i < bytes;) {
    const size_t stop = std::min(bytes, i + (kPageBytes - (address + i) % kPageBytes));
    Cell* cells = cells_at(address + i);
    if (cells == nullptr) {
      if (!is_exempt(static_cast<const char*>(p) + i)) {
        report(is_read(access) ? "out of bounds read" : "out of bounds write", place, i);
      }
      i = stop;
      continue;
    }
    while (i < stop) {
      const Words before(*cells);
      check_cell(*cells, access, place, i);
      const Words after(*cells);
      // bytes of one access mostly share their past
      for (++i, ++cells; i < stop && Words(*cells) == before; ++i, ++cells) after.copy_to(cells);
    }
  }
}

// --- atomics and fences -----------------------------------------------------------------------------------------

void atomic(const void* p, size_t bytes, Atomic kind, Location at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned atomic at %s", text_of(at).c_str());
  if (!kChecked) return;
  static constexpr Access kAccess[] = {Access::atomic_load, Access::atomic_store, Access::atomic_update};
  check(p, bytes, kAccess[static_cast<int>(kind)], *current, nullptr, &at);
  Flag& flag = grid.flags[p];
  if (kind != Atomic::store && !(current->last_flag == p && current->last_version == flag.version)) {
    current->offered.learn(flag.clock);
    current->last_flag = p;
    current->last_version = flag.version;
  }
  if (kind == Atomic::load) return;
  if (kind == Atomic::store) flag.clock.clear();  // an update goes on with what the flag carries, a store does not
  flag.clock.learn(current->released);
  ++flag.version;
}

void release_fence() {
  if (!kChecked) return;
  const Block& block = *current->block;
  const Warp& warp = block.warps[current->index / 32];
  Clock& known = current->released;
  known = current->acquired;
  known.learn(warp.acquired);
  known.learn(block.acquired);
  known.learn(Scope::block, current->id, block.synced);
  known.learn(Scope::warp, current->id, warp.synced);
  known.learn(Scope::thread, current->id, ++now);
}

void acquire_fence() {
  if (kChecked) current->acquired.learn(current->offered);
}

void read_only(const void* p, size_t bytes, Location at) {
  if (!kChecked) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (size_t i = 0; i < bytes; ++i) {
    const Cell* cell = cells_at(address + i);
    if (cell == nullptr || cell->written <= grid.launched) continue;
    report("__ldg of memory that this launch writes", {p, bytes, *current, nullptr, &at, 0}, i,
           cell->writer & Cell::kIdMask);
  }
}

}  // namespace emulator
