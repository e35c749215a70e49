// What kernels call that g++ compiled with -fsanitize: of libtsan's functions every access to memory, of libubsan's
// undefined arithmetic, an index outside of an array, a pointer that is null or not aligned. Neither library is linked.
#include "emulator/machine.h"

using emulator::Access;

namespace {

void access(const void* p, size_t bytes, Access kind, const void* pc) {
  if (emulator::current != nullptr) emulator::check(p, bytes, kind, *emulator::current, pc, nullptr);
}

[[noreturn]] void undefined(const std::string& what, const void* pc) {
  emulator::fail(what + " at " + emulator::source_of(pc));
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
  undefined("index " + std::to_string(index) + " outside of an array", __builtin_return_address(0));
}
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  undefined(address == 0 ? "access through a null pointer" : "misaligned access", __builtin_return_address(0));
}
void __ubsan_handle_shift_out_of_bounds(void*, uintptr_t, uintptr_t) {
  undefined("shift by more than the bits there are, or of a negative number", __builtin_return_address(0));
}
void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
  undefined("division by zero", __builtin_return_address(0));
}
void __ubsan_handle_add_overflow(void*, uintptr_t, uintptr_t) {
  undefined("overflow of a signed sum", __builtin_return_address(0));
}
void __ubsan_handle_sub_overflow(void*, uintptr_t, uintptr_t) {
  undefined("overflow of a signed difference", __builtin_return_address(0));
}
void __ubsan_handle_mul_overflow(void*, uintptr_t, uintptr_t) {
  undefined("overflow of a signed product", __builtin_return_address(0));
}
void __ubsan_handle_negate_overflow(void*, uintptr_t) {
  undefined("overflow of a signed negation", __builtin_return_address(0));
}

}  // extern "C"
