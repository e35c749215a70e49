// What kernels call that g++ compiled with -fsanitize: of libtsan's functions (every access to memory), and of
// libubsan's (an index outside an array, a pointer that is not aligned). Neither library is linked.
#include "emulator/machine.h"

using emulator::Access;

namespace {

void access(const void* p, size_t bytes, Access kind, const void* pc) {
  if (emulator::current != nullptr) emulator::check(p, bytes, kind, *emulator::current, pc, nullptr);
}

}  // namespace

extern "C" {

#define EMULATOR_HOOKS(bytes)                                                                                       \
  void __tsan_read##bytes(const void* p) { access(p, bytes, Access::read, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(const void* p) { access(p, bytes, Access::write, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##bytes(const void* p) { access(p, bytes, Access::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(const void* p) { access(p, bytes, Access::write, __builtin_return_address(0)); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
#undef EMULATOR_HOOKS

void __tsan_read_range(const void* p, size_t bytes) { access(p, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(const void* p, size_t bytes) { access(p, bytes, Access::write, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// the guard of a static variable in a function
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

void __ubsan_handle_out_of_bounds(void*, intptr_t index) {
  emulator::fail("index %td outside of an array at %s", index,
                 emulator::source_of(__builtin_return_address(0)).c_str());
}

void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  emulator::fail("misaligned access to address ...%03x at %s", static_cast<unsigned>(address & 0xfff),
                 emulator::source_of(__builtin_return_address(0)).c_str());
}

}  // extern "C"
