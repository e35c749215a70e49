// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;   // while it does not run
  unsigned char* stack = nullptr;  // lowest address; null for the thread that calls the emulator
};

constexpr size_t kStackBytes = 64 * 1024;

unsigned char* take_stack();  // null when there is none left
void return_stack(unsigned char* stack);
bool on_a_stack(const void* p);

// The first switch to `fiber` enters `entry`, which must not return.
void prepare(Fiber& fiber, void (*entry)());
void switch_to(Fiber& from, const Fiber& to);

}  // namespace emulator
