#include "block_params.h"

#include "cpu/runner.h"
#include "cpu/transformer.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

// The network's tokens that a window needs: [first, first + count). Without a start token token n has its parameters
// from the network's token n - 1, and token 0 has none.
struct Evaluated {
  int shift, first, count;

  explicit Evaluated(const BlockParamsParams& p)
      : shift(p.shape.start_token ? 0 : 1),
        first(std::max(p.start - shift, 0)),
        count(std::max(p.stop - shift - first, 0)) {}
};

template <class P>
class Pass {
 public:
  Pass(const BlockParamsParams& p, const Schedule& s, Scratch scratch, Member& member)
      : p_(p),
        evaluated_(p),
        member_(member),
        transformer_(p.shape, p.packed, p.condition, p.affine.flip, p.B, s.largest_group(),
                     std::max(evaluated_.count, 1), p.cache, scratch, member),
        used_(scratch.used()) {}

  int64_t scratch_used() const { return used_; }
  void clear() { transformer_.clear(); }

  void run(int64_t first, int64_t samples) {
    transformer_.begin(first, samples);
    if (p_.start == 0) transformer_.prefill();
    const auto [shift, begin, count] = evaluated_;
    if (count > 0) {
      member_.phase([&, begin = begin, count = count](int part) {
        transformer_.share(part, count, [&](int from, int to) { transformer_.embed(p_.x, begin, count, from, to); });
      });
      transformer_.layers(p_.condition.prefix_tokens + begin, count, true);
    }
    member_.phase([&, shift = shift, begin = begin, count = count](int part) {
      if (part == 0 && p_.start < shift)
        for (int b = 0; b < samples; ++b) std::fill_n(row(b, 0), p_.shape.raw_columns(), 0.f);
      transformer_.share(part, count, [&](int from, int to) {
        transformer_.project(count, from, to);
        for (int r = from; r < to; ++r) {
          const int b = r / count, n = begin + r % count + shift;
          std::memcpy(row(b, n), transformer_.raw(p_.affine, count, r, n), sizeof(float) * p_.shape.raw_columns());
        }
      });
    });
  }

 private:
  float* row(int b, int n) const {
    return p_.raw +
           ((transformer_.first() + b) * p_.shape.tokens + transformer_.data_index(n)) * p_.shape.raw_columns();
  }

  const BlockParamsParams& p_;
  const Evaluated evaluated_;
  Member& member_;
  Transformer<P, typename PassAttention<P>::type> transformer_;
  const int64_t used_;
};

}  // namespace

void block_params_scratch(const BlockParamsParams& p, const Schedule& s, int64_t* floats) {
  crew_scratch<Pass>(p, s, floats);
}

void block_params(const BlockParamsParams& p, const Schedule& s, int worker) { run_worker<Pass>(p, s, worker); }

}  // namespace biflow::cpu::BIFLOW_ISA
