// The weights of a block's products as a stream: every thread copies its own 16-byte pieces into a ring of its own in
// shared memory, some ahead of their use, and reads only what it copied. So the stream needs no barrier and goes on
// over phases, layers and tokens: while the grid waits, the next phase's first weights arrive.
#pragma once

#include "cuda/decode_block_state.cuh"

namespace biflow::cuda {

// Column tiles whose sums a warp keeps in registers at once: with four row tiles of tensor cores two, more would spill.
template <int kRowTiles>
BIFLOW_DEVICE constexpr int tiles_at_once(bool tensor_cores) {
  return !tensor_cores ? 4 / kRowTiles : kRowTiles == 4 ? 2 : 4;
}

template <class Act>
BIFLOW_DEVICE bool on_tensor_cores(DecodePhase phase) {
  return sizeof(Act) == 2 && !is_fp32_product(phase);
}

// The order of pieces, for the warp of a thread: phases; groups of column tiles; the warp's blocks of inputs; tiles.
template <class Act, int kRowTiles>
class WeightStream {
 public:
  // ring: [kRing][kDecodeThreads] pieces. owner: this block's among those that share the columns, negative: none.
  BIFLOW_DEVICE WeightStream(const DecodeState& s, uint4* ring, int owner)
      : s_(s), ring_(ring + threadIdx.x), owner_(owner) {}

  // Starts with the first product at or after `at`; ends after that phase, or with the last.
  BIFLOW_DEVICE void start(const DecodePlace& at, bool one_phase) {
    at_ = at, one_phase_ = one_phase;
    live_ = owner_ >= 0 && !s_.is_last(at_);
    if (live_ && !enter()) next_phase();
    for (int i = 0; i < kRing - 1; ++i) fetch();
  }

  // This thread's 16 bytes of the next fragment.
  BIFLOW_DEVICE uint4 next() {
    arch::cp_async_wait<kRing - 2>();
    const uint4 w = ring_[out_ * kDecodeThreads];
    out_ = out_ + 1 == kRing ? 0 : out_ + 1;
    fetch();  // into the place that was read one call ago
    return w;
  }

 private:
  // Always one group, an empty one at the end: what `next` waits for is counted in groups.
  BIFLOW_DEVICE void fetch() {
    if (live_) {
      const int64_t piece = static_cast<int64_t>(first_ + tile_ * s_.owners) * linear_.blocks + block_;
      arch::cp_async_16(ring_ + in_ * kDecodeThreads, linear_.weight + piece * 32 + threadIdx.x % 32);
      in_ = in_ + 1 == kRing ? 0 : in_ + 1;
      step();
    }
    arch::cp_async_commit();
  }

  BIFLOW_DEVICE void step() {
    if (++tile_ < at_once_ && first_ + tile_ * s_.owners < linear_.tiles) return;
    tile_ = 0;
    if ((block_ += kDecodeWarps) < linear_.blocks) return;
    block_ = threadIdx.x / 32;
    first_ += at_once_ * s_.owners;
    if (first_ < linear_.tiles) return;
    next_phase();
  }

  BIFLOW_DEVICE void next_phase() {
    live_ = false;
    if (one_phase_) return;
    do {
      s_.advance(at_);
      if (s_.is_last(at_)) return;
    } while (!enter());
    live_ = true;
  }

  // Whether this warp has pieces of the phase at_; then the first is current.
  BIFLOW_DEVICE bool enter() {
    if (!s_.is_product(at_)) return false;
    linear_ = linear_of<Act>(s_, at_);
    at_once_ = tiles_at_once<kRowTiles>(on_tensor_cores<Act>(at_.phase));
    first_ = owner_, tile_ = 0, block_ = threadIdx.x / 32;
    return first_ < linear_.tiles && block_ < linear_.blocks;
  }

  const DecodeState& s_;
  uint4* const ring_;
  const int owner_;
  bool live_ = false, one_phase_ = false;
  int in_ = 0, out_ = 0;
  DecodePlace at_;  // the next piece to copy
  DecodeLinear linear_{};
  int at_once_ = 0, first_ = 0, tile_ = 0, block_ = 0;
};

}  // namespace biflow::cuda
