#include "decode_block.h"

#include "cpu/affine_math.h"
#include "cpu/runner.h"
#include "cpu/transformer.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

template <class P>
class Decoder {
 public:
  Decoder(const DecodeBlockParams& p, const Schedule& s, Scratch scratch, Member& member)
      : p_(p),
        shape_(p.shape),
        member_(member),
        affine_row_(scratch.take<float>(member.count() * 2 * round_up(shape_.channels, kColumnGroup))),
        transformer_(shape_, p.packed, p.condition, p.affine.flip, p.B, s.largest_group(), 1, nullptr, scratch, member),
        used_(scratch.used()) {}

  int64_t scratch_used() const { return used_; }
  void clear() { transformer_.clear(); }

  void run(int64_t first, int64_t samples) {
    transformer_.begin(first, samples);
    transformer_.prefill();
    const int shift = shape_.start_token ? 0 : 1;  // token n has its parameters from the network's token n - shift
    for (int n = 0; n <= shape_.tokens; ++n) {
      const int evaluated = n - shift;
      const bool more = n < shape_.tokens && evaluated >= 0;
      member_.phase([&](int part) {
        transformer_.share(part, 1, [&](int begin, int end) {
          if (evaluated > 0) transformer_.project(1, begin, end);
          for (int b = begin; n > 0 && b < end; ++b) produce(n - 1, b, evaluated > 0);
          if (more) transformer_.embed(p_.x, evaluated, 1, begin, end);
        });
      });
      if (more) transformer_.layers(p_.condition.prefix_tokens + evaluated, 1, true);
    }
  }

 private:
  // x_n = z_n sigma(a) + b of sample b from its raw parameters, zeros where there are none yet
  void produce(int n, int b, bool have_raw) {
    const int D = shape_.channels;
    const int64_t stride = round_up(D, kColumnGroup);
    float *scale = affine_row_ + member_.me() * 2 * stride, *shift = scale + stride;
    std::fill_n(scale, 2 * stride, 0.f);
    if (have_raw) {
      const float* raw = transformer_.raw(p_.affine, 1, b, n);
      const bool interleaved = p_.affine.layout == Layout::interleaved;
      const bool shift_first = p_.affine.layout == Layout::shift_scale;
      for (int i = 0; i < D; ++i) {
        if (shape_.shift_only) {
          shift[i] = raw[i];
        } else {
          scale[i] = raw[interleaved ? 2 * i : shift_first ? D + i : i];
          shift[i] = raw[interleaved ? 2 * i + 1 : shift_first ? i : D + i];
        }
      }
    }
    const int64_t token = ((transformer_.first() + b) * shape_.tokens + transformer_.data_index(n)) * D;
    affine_decode_row(p_.affine, scale, shift, p_.z + token, p_.x + token, D);
  }

  const DecodeBlockParams& p_;
  const BlockShape& shape_;
  Member& member_;
  float* affine_row_;  // [member][scale, shift][D]
  Transformer<P, StepAttention<P>> transformer_;
  const int64_t used_;
};

}  // namespace

void decode_block_scratch(const DecodeBlockParams& p, const Schedule& s, int64_t* floats) {
  crew_scratch<Decoder>(p, s, floats);
}

void decode_block(const DecodeBlockParams& p, const Schedule& s, int worker) { run_worker<Decoder>(p, s, worker); }

}  // namespace biflow::cpu::BIFLOW_ISA
