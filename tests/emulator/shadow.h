// What the checker knows of every byte of device and shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/clock.h"

namespace emulator {

struct Cell {
  // Of `written`: no memory is here; never written. Later times: who wrote it when.
  static constexpr Time kNone = 0, kUninitialised = 1, kHost = 2;
  // Of writer and readers, above the thread's id: the access was atomic; a copy is under way; scope of the readers.
  static constexpr uint32_t kAtomic = 1u << 31, kInFlight = 1u << 30, kScopeShift = 29, kIdMask = (1u << 29) - 1;

  Time written;
  uint32_t writer;
  // The block that read last since the write, and another one: when last, and by whom (one thread, or unordered
  // threads of one warp or block).
  Time read[2];
  uint32_t reader[2];
};

// The cells of the 64 KiB page of `address`, from `address` on; null where no memory was ever declared.
constexpr size_t kPageBytes = size_t{1} << 16;
Cell* cells_at(uintptr_t address);

// What a block has for its shared memory: [gap] dynamic [gap] variable [gap] variable ...
constexpr size_t kRoomBytes = 6 * kPageBytes;

// Sets all cells of [p, p + bytes) to a state; pages appear as needed. No-op in plain builds.
void mark(const void* p, size_t bytes, Time written);

// "byte 12 of tensor 2 (4096 bytes)", "byte 4 of shared variable 1 (128 bytes)".
std::string memory_text(const void* p);

// Code and data of this library, arguments of the launch, stacks: memory that needs no checks.
bool is_exempt(const void* p);

}  // namespace emulator
