// What the bindings of a flow block's ops share: checks, the block's shape, its condition, the crews.
#pragma once

#include <time.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "cpu/crew.h"
#include "options.h"

namespace biflow {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "(2, 3)" of what `at` gives for each of n dimensions.
template <class At>
std::string dimensions(int64_t n, At&& at) {
  std::string text = "(";
  for (int64_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(at(i));
  return text + (n == 1 ? ",)" : ")");
}

// float32, of this shape, contiguous, on the device of `like`, or on the CPU where that is null; op and what name the
// argument in the error.
inline void check_tensor(const char* op, const char* what, const Tensor& t, std::initializer_list<int64_t> shape,
                         const Tensor* like = nullptr) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", what, ": expected float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(like != nullptr ? t.device() == like->device() : t.device().is_cpu(), op, ": ", what,
                  ": expected a tensor on the ", like != nullptr ? "device of the first" : "CPU", ", got one on ",
                  t.device().is_cpu()    ? "the CPU"
                  : t.device().is_cuda() ? "a GPU"
                                         : "another device");
  const int64_t n = shape.size();
  bool same = t.dim() == n;
  for (int64_t i = 0; same && i < n; ++i) same = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, op, ": ", what, ": expected shape ", dimensions(n, [&](int64_t i) { return shape.begin()[i]; }),
                  ", got ", dimensions(t.dim(), [&](int64_t i) { return t.size(i); }));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", what, ": expected a contiguous tensor, got strides ",
                  dimensions(t.dim(), [&](int64_t i) { return t.stride(i); }));
}

inline const float* optional_input(const char* op, const char* what, const OptionalTensor& t,
                                   std::initializer_list<int64_t> shape, const Tensor* like = nullptr) {
  if (!t) return nullptr;
  check_tensor(op, what, *t, shape, like);
  return t->const_data_ptr<float>();
}

// Packed weights, or a cache: whole vectors are read from it.
inline float* aligned(const char* op, const char* what, const Tensor& t) {
  float* data = static_cast<float*>(t.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, op, ": ", what, " must be 64-byte aligned");
  return data;
}

inline BlockShape make_shape(int64_t tokens, int64_t channels, int64_t width, int64_t layers, int64_t head_dim,
                             int64_t mlp_hidden, const std::string& norm, const std::string& gate, bool qk_norm,
                             bool rope, bool pos_embed, bool start_token, bool shift_only,
                             const std::string& precision) {
  for (int64_t n : {tokens, channels, width, layers, head_dim, mlp_hidden})
    STD_TORCH_CHECK(n > 0 && n < (1 << 24), "flow block: sizes must be positive and below 2^24, got ", n);
  STD_TORCH_CHECK(head_dim % 2 == 0 && head_dim <= 256, "flow block: head_dim must be even and at most 256");
  STD_TORCH_CHECK(width % head_dim == 0, "flow block: width must be a multiple of head_dim");
  BlockShape s;
  s.tokens = static_cast<int>(tokens), s.channels = static_cast<int>(channels), s.width = static_cast<int>(width);
  s.layers = static_cast<int>(layers), s.head_dim = static_cast<int>(head_dim);
  s.mlp_hidden = static_cast<int>(mlp_hidden);
  s.norm = parse<Norm>("flow block", "norm", norm, {"layernorm", "rmsnorm"});
  s.gate = parse<Gate>("flow block", "gate", gate, {"gelu", "swiglu"});
  s.qk_norm = qk_norm, s.rope = rope, s.pos_embed = pos_embed;
  s.start_token = start_token, s.shift_only = shift_only;
  s.precision = parse<Precision>("flow block", "precision", precision, {"fp32", "bf16"});
  return s;
}

// The condition of a pass over B samples, checked.
inline BlockCondition make_condition(const char* op, const BlockShape& s, int64_t B, const OptionalTensor& added,
                                     const OptionalTensor& prefix, const OptionalTensor& null_added,
                                     const OptionalTensor& null_prefix, double guidance, const std::string& guide,
                                     bool anneal, double attn_temp, const Tensor* like = nullptr) {
  BlockCondition c;
  c.prefix_tokens = prefix && prefix->dim() == 3 ? static_cast<int>(prefix->size(1)) : 0;
  const int64_t S = c.prefix_tokens, width = s.width;
  c.added = optional_input(op, "added", added, {B, width}, like);
  c.prefix = optional_input(op, "prefix", prefix, {B, S, width}, like);
  c.guidance = narrowed(op, "guidance", guidance, false);
  c.guided = guidance > 0;
  if (c.guided) {
    c.null_added = optional_input(op, "null_added", null_added, {B, width}, like);
    c.null_prefix = optional_input(op, "null_prefix", null_prefix, {B, S, width}, like);
    STD_TORCH_CHECK(!c.prefix == !c.null_prefix, op, ": prefix and null_prefix go together");
  }
  c.guide_a = guide.find('a') != std::string::npos;
  c.guide_b = guide.find('b') != std::string::npos;
  c.anneal = anneal;
  c.attn_temp = narrowed(op, "attn_temp", attn_temp, true);
  return c;
}

// When more than one thread is worth its while. On a machine with other load a thread that a call needs may not be
// running: the call then waits for a time slice of the operating system, many times its own length. Time that is lost
// so is paid for by calls on one thread, until they have taken ten times as long.
class Contention {
 public:
  int threads() const {
    return wall() < quiet_until_.load(std::memory_order_relaxed) ? 1 : torch::stable::get_num_threads();
  }
  // waited: of a call that took `took`, the nanoseconds until its last thread came or ran. Some are usual: threads do
  // not start at once, and shares are not equal.
  void report(int64_t waited, int64_t took) {
    if (waited <= kUsual || 4 * waited <= took) {
      if (good_.fetch_add(1, std::memory_order_relaxed) == kForget) bad_.store(0, std::memory_order_relaxed);
      return;
    }
    good_.store(0, std::memory_order_relaxed);
    const int before = std::min(bad_.fetch_add(1, std::memory_order_relaxed), kMostDoublings);
    quiet_until_.store(wall() + std::max(10 * waited, kQuiet << before), std::memory_order_relaxed);
  }
  static int64_t wall() { return nanoseconds(CLOCK_MONOTONIC); }
  static int64_t running() { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); }  // of this thread

 private:
  static int64_t nanoseconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
  }
  static constexpr int64_t kUsual = 200000, kQuiet = 5000000;  // nanoseconds
  static constexpr int kMostDoublings = 6, kForget = 100;
  std::atomic<int64_t> quiet_until_{0};
  std::atomic<int> bad_{0},
      good_{0};  // calls on several threads that waited too long, and since then those that did not
};

inline Contention& contention() {  // of this process
  static Contention c;
  return c;
}

// Runs a kernel of crews on torch's threads: rows of each sample go through the layers together with those of others,
// up to max_rows. `scratch` tells how much memory a crew needs.
template <class Params, class ScratchSize, class Kernel>
void run_crews(const Params& p, int64_t rows_per_sample, int64_t max_rows, ScratchSize&& scratch, Kernel&& kernel) {
  if (p.B == 0) return;
  // a step reads the weights of the layers: from the L2 cache, if they fit, few rows pay for that
  constexpr int64_t kCacheWords = 400 << 10;
  const int64_t words = packed_block(p.shape).layer_size * p.shape.layers, own_rows = words <= kCacheWords ? 2 : 16;
  cpu::Schedule s =
      cpu::make_schedule(p.B, rows_per_sample, max_rows, own_rows, words, p.shape.has_halves(), contention().threads());
  scratch(p, s, &s.scratch_stride);
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  const size_t bytes = sizeof(float) * round_up(s.crews * s.scratch_stride, 16);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::bad_alloc();
  std::vector<cpu::CrewPart> parts(s.workers());
  s.parts = parts.data();
  s.scratch = memory.get();
  if (s.workers() == 1) return kernel(p, s, 0);
  const int64_t start = Contention::wall();
  int64_t own = 0;  // of the calling thread, which has the first share: libgomp waits before and after it
  std::atomic<int64_t> paused{0};  // the longest time that a thread was not running within its share
  torch::stable::parallel_for(0, s.workers(), 1, [&](int64_t begin, int64_t end) {
    const int64_t wall = Contention::wall(), running = Contention::running();
    for (int64_t worker = begin; worker < end; ++worker) kernel(p, s, static_cast<int>(worker));
    const int64_t took = Contention::wall() - wall, lost = took - (Contention::running() - running);
    for (int64_t most = paused; lost > most && !paused.compare_exchange_weak(most, lost);) continue;
    if (begin == 0) own = took;
  });
  const int64_t took = Contention::wall() - start;
  contention().report(std::max(took - own, paused.load()), took);
}

}  // namespace biflow
