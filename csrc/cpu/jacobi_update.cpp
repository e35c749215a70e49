#include "jacobi_update.h"

#include "cpu/affine_math.h"
#include "cpu/convert.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

// kLanes channels of one token: their raw scale and shift, from a row of raw parameters
struct Parameters {
  Layout layout;
  bool shift_only;
  int64_t D;

  void read(const float* raw, int64_t i, int n, vfloat& a, vfloat& b) const {
    const bool whole = n == kLanes;
    const auto at = [&](int64_t k) { return whole ? load(raw + k) : load_partial(raw + k, n); };
    if (shift_only) {
      a = vfloat{};
      b = at(i);
    } else if (layout == Layout::interleaved) {
      vfloat low, high;
      low = high = vfloat{};
      std::memcpy(&low, raw + 2 * i, sizeof(float) * (2 * n < kLanes ? 2 * n : kLanes));
      if (2 * n > kLanes) std::memcpy(&high, raw + 2 * i + kLanes, sizeof(float) * (2 * n - kLanes));
      split_pairs(low, high, a, b);
    } else {
      a = at(layout == Layout::shift_scale ? D + i : i);
      b = at(layout == Layout::shift_scale ? i : D + i);
    }
  }
};

}  // namespace

void jacobi_update(const JacobiUpdateParams& p, int64_t begin, int64_t end) {
  const Parameters parameters{p.affine.layout, p.shift_only, p.D};
  const int64_t columns = p.shift_only ? p.D : 2 * p.D;
  with_affine_options(p.affine, [&](auto map, auto kind, auto both) {
    const vfloat c = broadcast(static_cast<float>(p.affine.clip_value));
    const vfloat one = broadcast(1.f);
    for (int64_t sample = begin; sample < end; ++sample) {
      vfloat update = {}, residual = {};
      vfloat poison = {};  // 0, or NaN once anything was NaN or infinite
      for (int64_t n = p.start; n < p.stop; ++n) {
        const int64_t token = sample * p.T + (p.affine.flip ? p.T - 1 - n : n);
        float* x = p.x + token * p.D;
        const float *z = p.z + token * p.D, *raw = p.raw + token * columns;
        for (int64_t i = 0; i < p.D; i += kLanes) {
          const int count = p.D - i < kLanes ? static_cast<int>(p.D - i) : kLanes;
          vfloat a, b;
          parameters.read(raw, i, count, a, b);
          if constexpr (both.value) b = clip<kind.value>(b, c);
          const auto scale = scale_map<map.value>(clip<kind.value>(a, c));
          const bool whole = count == kLanes;
          const vfloat vz = whole ? load(z + i) : load_partial(z + i, count);
          const vfloat old = whole ? load(x + i) : load_partial(x + i, count);
          const vfloat fresh = vz * scale.sigma + b;
          const vfloat moved = abs(fresh - old) / max(one, abs(fresh));
          const vfloat off = abs((old - b) * scale.inverse - vz) / max(one, abs(vz));
          vfloat bad = (fresh - fresh) + (off - off);  // NaN unless finite
          if (whole) {
            store(x + i, fresh);
            update = max(update, moved);
            residual = max(residual, off);
          } else {  // lanes past the end have x = z = 0 and raw 0: they count for nothing
            store_partial(x + i, fresh, count);
            vint lane = {};
            for (int k = 0; k < kLanes; ++k) lane[k] = k;
            update = lane < count ? max(update, moved) : update;
            residual = lane < count ? max(residual, off) : residual;
            bad = lane < count ? bad : vfloat{};
          }
          poison += bad;
        }
      }
      const float bad = reduce_add(poison);
      p.moved[sample] = reduce_max(update) + bad;
      p.moved[p.B + sample] = reduce_max(residual) + bad;
    }
  });
}

}  // namespace biflow::cpu::BIFLOW_ISA
