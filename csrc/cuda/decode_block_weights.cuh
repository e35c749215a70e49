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

// Column tiles of the group that starts with `first`, of the every owners-th that one block has.
BIFLOW_DEVICE int tiles_of_group(const DecodeLinear& linear, int first, int owners, int at_once) {
  const int left = linear.tiles - first;  // at once are four at most
  return left <= owners || at_once == 1 ? 1 : left <= 2 * owners || at_once == 2 ? 2 : left <= 3 * owners ? 3 : 4;
}

// The order of pieces, for the warp of a thread: products; groups of column tiles; the warp's blocks of inputs; tiles.
template <class Act, int kRowTiles>
class WeightStream {
 public:
  // linears: all products of a step. ring: [kRing][kDecodeThreads] pieces. owner: this block's among those that share
  // the columns, negative: none.
  BIFLOW_DEVICE WeightStream(const DecodeState& s, const DecodeLinear* linears, uint4* ring, int owner)
      : s_(s), linears_(linears), ring_(ring + threadIdx.x), owner_(owner) {}

  // Starts with the product at `at`, or (not one_phase, `at` is the first place) with the first one; ends with that
  // product, or with the last.
  BIFLOW_DEVICE void start(const DecodePlace& at, bool one_phase) {
    one_phase_ = one_phase, step_ = at.step, product_ = one_phase ? s_.product_of(at) : 0;
    live_ = owner_ >= 0 && !s_.is_last(at) && (!one_phase || s_.is_product(at));
    if (live_ && one_phase) live_ = enter();
    if (live_ && !one_phase) find();
    fill(kRing);
  }

  // The next pieces that are used can be read: at most kAtOnce, then they are to be replaced.
  BIFLOW_DEVICE void wait() const { arch::cp_async_wait<kRing - kAtOnce>(); }
  // This thread's 16 bytes of the next fragment.
  BIFLOW_DEVICE uint4 next() {
    const uint4 w = ring_[out_];
    out_ = out_ + kDecodeThreads == kRing * kDecodeThreads ? 0 : out_ + kDecodeThreads;
    return w;
  }
  // Into the places of the last `count` pieces, which were used, those that come next. A loop: its body is long, and
  // products are unrolled.
  BIFLOW_DEVICE void fill(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (live_) {
        arch::cp_async_16(ring_ + in_, piece_);
        in_ = in_ + kDecodeThreads == kRing * kDecodeThreads ? 0 : in_ + kDecodeThreads;
        step();
      }
      arch::cp_async_commit();  // always one group, an empty one at the end: what `wait` waits for is counted in groups
    }
  }

 private:
  BIFLOW_DEVICE void step() {
    piece_ += to_next_tile_;
    if (--tiles_left_ > 0) return;
    tiles_left_ = tiles_here_;
    piece_ = block_ += 32 * kDecodeWarps;
    if ((blocks_left_ -= kDecodeWarps) > 0) return;
    if ((first_ += at_once_ * s_.owners) < linears_[product_].tiles) return begin_group();
    if (one_phase_) {
      live_ = false;
    } else {
      ++product_;
      find();
    }
  }

  // From product_ on, the first product of which this warp has pieces; then the first of them is current.
  BIFLOW_DEVICE void find() {
    for (;; ++product_) {
      if (product_ == s_.products()) {
        product_ = 0;
        if (++step_ == s_.steps) break;
      }
      if (s_.has_product(step_, product_) && enter()) return;
    }
    live_ = false;
  }

  // Whether this warp has pieces of product_; then the first is current.
  BIFLOW_DEVICE bool enter() {
    if (owner_ >= linears_[product_].tiles || static_cast<int>(threadIdx.x / 32) >= linears_[product_].blocks)
      return false;
    first_ = owner_;
    at_once_ = tiles_at_once<kRowTiles>(sizeof(Act) == 2 && product_ > 0 && product_ < s_.products() - 1);
    begin_group();
    return true;
  }

  // The group of tiles from first_ on.
  BIFLOW_DEVICE void begin_group() {
    const DecodeLinear linear = linears_[product_];
    const int warp = threadIdx.x / 32;
    to_next_tile_ = static_cast<uint32_t>(s_.owners) * linear.blocks * 32;
    block_ = linear.weight + (static_cast<int64_t>(first_) * linear.blocks + warp) * 32 + threadIdx.x % 32;
    piece_ = block_, blocks_left_ = linear.blocks - warp;
    tiles_left_ = tiles_here_ = tiles_of_group(linear, first_, s_.owners, at_once_);
  }

  const DecodeState& s_;
  const DecodeLinear* const linears_;
  uint4* const ring_;
  const int owner_;
  bool live_ = false, one_phase_ = false;
  int in_ = 0, out_ = 0;          // places in the ring
  int step_ = 0, product_ = 0;    // of the next piece to copy
  int first_ = 0, at_once_ = 0;   // its group of tiles
  const uint4* piece_ = nullptr;  // the piece
  const uint4* block_ = nullptr;  // that of the group's first tile in the same block of inputs
  uint32_t to_next_tile_ = 0;     // pieces
  int tiles_here_ = 0, tiles_left_ = 0, blocks_left_ = 0;
};

}  // namespace biflow::cuda
