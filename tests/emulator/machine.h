// The running grid, as the emulator's own files see it.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/clock.h"
#include "emulator/engine.h"
#include "emulator/fiber.h"

namespace emulator {

#ifdef EMULATOR_CHECKED
constexpr bool kChecked = true;  // kernels are compiled with hooks at every access
#else
constexpr bool kChecked = false;
#endif

enum class Order : int { forward, reverse, random };
enum class CopyAsync : int { lazy, eager, random };  // when a copy lands: when waited for, at once, either

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 1;
  CopyAsync copy_async = CopyAsync::lazy;
};
extern Settings settings;

struct Block;

struct Copy {
  void* to;
  const void* from;
  bool read, landed;
  Location at;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;  // null: the thread that called launch
  uint32_t index = 0;      // in the block
  ThreadId id = 0;
  uint3 place{};
  bool done = false;
  const char* waits_in = nullptr;
  Location where{};

  std::vector<Copy> copies;    // issued and not waited for, oldest first
  std::vector<size_t> groups;  // how many of them each committed group ends at

  // Release and acquire (checked builds). What an acquire_fence brought; what the flags that were read offer; what the
  // thread's next atomics publish.
  Clock acquired, offered, released;
  const void* last_flag = nullptr;  // read last, in this version
  uint64_t last_version = 0;
};

// Lanes of one warp that have arrived at a collective and wait for the others.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  Location at{};
  void* data[32];
};

struct Warp {
  uint32_t exist = 0, exited = 0;
  Time synced = 0;  // its last __syncwarp
  Clock acquired;
  Rendezvous meetings[4];
};

struct Block {
  uint32_t linear = 0, size = 0, live = 0;
  uint3 place{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  size_t next = 0;  // ready[0 .. next) have run

  std::vector<Thread*> at_barrier, at_grid_barrier;
  const char* barrier = nullptr;
  Location barrier_at{};
  int votes = 0, counted = 0;
  Time synced = 0;  // its last barrier
  Clock acquired;

  struct Variable {
    const void* key;
    const char* name;
    unsigned char* address;
    size_t bytes;
  };
  unsigned char* shared = nullptr;  // room for all of it
  size_t shared_used = 0, static_bytes = 0;
  std::vector<Variable> variables;  // [0] is dynamic memory, then static ones in order of first use
  Time started = 0;

  uint32_t thread_mask(uint32_t warp) const { return warps[warp].exist & ~warps[warp].exited; }
};

struct Flag {
  Clock clock;
  uint64_t version = 0;
};

struct Grid {
  Launch launch{};
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  uint64_t total = 0, live = 0, at_barrier = 0;
  Location barrier_at{};
  Time launched = 0, synced = 0;  // its start, its last grid barrier
  uint64_t spins = 0;             // since somebody got on
  std::unordered_map<const void*, Flag> flags;
};

extern Grid grid;
extern Thread* current;  // null outside launches
extern Time now;         // counts barriers and fences, over all launches

uint64_t random_number();

// Ends the launch with Error: `what`, where `current` is, the kernel.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The current thread waits: others run until somebody calls wake().
void wait(const char* in, Location at);
void wake(Thread* thread);

// --- checker.cpp ------------------------------------------------------------------------------------------------

enum class Access { read, write, atomic_load, atomic_store, atomic_update, copy_issued, copy_landed };

// Checks an access of `thread` and records it. `pc`: where, if `at` does not say it.
void check(const void* p, size_t bytes, Access access, const Thread& thread, const void* pc, const Location* at);

// --- memory.cpp -------------------------------------------------------------------------------------------------

void begin_shared(Block& block, size_t dynamic);

// --- report.cpp -------------------------------------------------------------------------------------------------

// "kernel.cuh:12" or, through inlined functions, "vector.cuh:5 < kernel.cuh:12".
std::string source_of(const void* pc);
std::string kernel_text();  // of the last launch
std::string text_of(Location at);
std::string thread_text(ThreadId id);

}  // namespace emulator
