#include "emulator/fiber.h"

#include <sys/mman.h>

#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// One reservation for all stacks. Below each of the first kGuarded ones lies a page that nobody may touch; the kernel
// limits the number of mappings, and threads that run the same code need about the same depth.
constexpr size_t kStacks = 40960, kGuarded = 8192, kGuardBytes = 4096;

struct Stacks {
  unsigned char* begin = nullptr;
  size_t used = 0;
  std::vector<unsigned char*> free;
};
Stacks stacks;

}  // namespace

unsigned char* take_stack() {
  if (!stacks.free.empty()) {
    unsigned char* stack = stacks.free.back();
    stacks.free.pop_back();
    return stack;
  }
  if (stacks.begin == nullptr) {
    void* p = mmap(nullptr, kStacks * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) return nullptr;
    stacks.begin = static_cast<unsigned char*>(p);
  }
  if (stacks.used == kStacks) return nullptr;
  unsigned char* stack = stacks.begin + stacks.used * kStackBytes;
  if (stacks.used++ < kGuarded) mprotect(stack, kGuardBytes, PROT_NONE);
  return stack;
}

void return_stack(unsigned char* stack) { stacks.free.push_back(stack); }

bool on_a_stack(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - stacks.begin) < stacks.used * kStackBytes;
}

#if defined(__x86_64__)

// Saves the registers that a call preserves, takes the other stack, restores them.
extern "C" void emulator_switch(void** save, void* stack_pointer);
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

void prepare(Fiber& fiber, void (*entry)()) {
  auto top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // in the place of a return address: the ABI wants rsp % 16 == 8 at entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_to(Fiber& from, const Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Fiber& fiber, void (*entry)()) {
  // the context lies at the top of its own stack
  auto context = reinterpret_cast<ucontext_t*>(fiber.stack + kStackBytes - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<unsigned char*>(context) - fiber.stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
}

void switch_to(Fiber& from, const Fiber& to) {
  static ucontext_t caller;
  if (from.stack == nullptr) from.stack_pointer = &caller;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<const ucontext_t*>(to.stack_pointer));
}

#endif

}  // namespace emulator
