// A head at a time, all of it in the L2 cache. A tile product multiplies 16 rows of A, whose k runs along a row, with B
// given as words: pairs of k, a row of columns for each. Of a matrix with rows of channels there are two such forms:
//   turned:  the words of its rows, transposed: k are the channels, columns the rows        (q k^T, grad_o v^T)
//   paired:  two rows side by side, interleaved: k are the rows, columns the channels       (P v, dS k, P^T grad_o)
// and the words of the paired form, transposed, are the rows of the transposed matrix (P^T, dS^T).
#include "attention_short.h"

#include <memory>

#include "cpu/linear_bf16.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

constexpr int kTile = 16;

int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }  // whole tiles as k and, two at a time, as columns

typedef uint32_t vword __attribute__((vector_size(64), may_alias));
typedef uint32_t vword_unaligned __attribute__((vector_size(64), aligned(4), may_alias));

vword load_words(const uint32_t* p) { return *reinterpret_cast<const vword_unaligned*>(p); }
void store_words(uint32_t* p, vword v) { *reinterpret_cast<vword_unaligned*>(p) = v; }

template <int kStep, std::size_t... I>
void exchange(vword& a, vword& b, std::index_sequence<I...>) {
  const vword low = __builtin_shufflevector(a, b, static_cast<int>(I & kStep ? 16 + I - kStep : I)...);
  b = __builtin_shufflevector(a, b, static_cast<int>(I & kStep ? 16 + I : I + kStep)...);
  a = low;
}
template <int kStep>
void exchange_rows(vword* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<16>());
}

// to[c][r] = from[r][c] for words; rows and columns multiples of 16
void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t c = 0; c < columns; c += kTile) {
      vword block[kTile];
      for (int i = 0; i < kTile; ++i) block[i] = load_words(from + (r + i) * from_stride + c);
      exchange_rows<8>(block);
      exchange_rows<4>(block);
      exchange_rows<2>(block);
      exchange_rows<1>(block);
      for (int i = 0; i < kTile; ++i) store_words(to + (c + i) * to_stride + r, block[i]);
    }
}

// to[i / 2][c] = (from[i][c], from[i + 1][c]); rows even, columns a multiple of 16
void pair_rows(const uint16_t* from, int64_t stride, uint32_t* to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t c = 0; c < columns; c += kTile) {
      const auto wide = [&](int64_t row) {
        return __builtin_convertvector(vhalf(*reinterpret_cast<const vhalf_unaligned*>(from + row * stride + c)),
                                       vword);
      };
      store_words(to + i / 2 * columns + c, wide(i) | wide(i + 1) << 16);
    }
}

// c (16, columns) = a (16, k) b: a bf16 rows, b words (k / 2, columns); k and columns multiples of 32
void multiply(const uint16_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t k, int64_t columns,
              float* c, int64_t c_stride) {
  finish_stores();
  for (int64_t j = 0; j < columns; j += 2 * kTile) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < k; i += 32) {
      _tile_loadd(4, a + i, a_stride * 2);
      _tile_loadd(6, b + i / 2 * b_stride + j, b_stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + i / 2 * b_stride + j + kTile, b_stride * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c + j, c_stride * 4);
    _tile_stored(1, c + j + kTile, c_stride * 4);
  }
  finish_stores();
}

class Head {
 public:
  explicit Head(const AttentionShortParams& p)
      : p_(p), d_(p.d), tokens_(padded(p.T)), size_(tokens_ * d_), memory_(new uint16_t[words() * 2 + 32]) {
    uint16_t* next = memory_.get();
    next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / 2;
    const auto halves = [&](int64_t n) {
      uint16_t* here = next;
      for (int64_t i = 0; i < n; ++i) here[i] = 0;
      next += n;
      return here;
    };
    q_ = halves(size_), k_ = halves(size_), v_ = halves(size_), grad_ = halves(size_);
    k_turned_ = reinterpret_cast<uint32_t*>(halves(size_)), v_turned_ = reinterpret_cast<uint32_t*>(halves(size_));
    paired_ = reinterpret_cast<uint32_t*>(halves(size_));
    scores_ = reinterpret_cast<float*>(halves(2 * kTile * tokens_));
    slopes_ = reinterpret_cast<float*>(halves(2 * kTile * tokens_));
    out_ = reinterpret_cast<float*>(halves(2 * kTile * d_));
    weights_ = halves(tokens_ * tokens_), slope_ = halves(tokens_ * tokens_);
    turned_ = reinterpret_cast<uint32_t*>(halves(tokens_ * tokens_));
    pairs_ = reinterpret_cast<uint32_t*>(halves(tokens_ * tokens_));
  }

  void forward(int64_t head) {
    at(head);
    read(p_.q, p_.q_stride, q_);
    read(p_.k, p_.k_stride, k_);
    read(p_.v, p_.v_stride, v_);
    turn(k_, k_turned_);
    pair_rows(v_, d_, paired_, tokens_, d_);
    float* lse = p_.lse + head * p_.T;
    for (int64_t row = 0; row < p_.T; row += kTile) {
      const int64_t seen = columns_of(row), count = rows_from(row);
      multiply(q_ + row * d_, d_, k_turned_, tokens_, d_, seen, scores_, tokens_);
      float inverse[kTile];
      for (int64_t i = 0; i < count; ++i) {
        const float* s = scores_ + i * tokens_;
        const int64_t n = keys_of(row + i);
        const float top = largest(s, n);
        const float sum = exponents(s, n, seen, top, weights_ + i * tokens_);
        inverse[i] = 1.f / sum;
        lse[row + i] = top + std::log(sum);
      }
      multiply(weights_, tokens_, paired_, d_, seen, d_, out_, d_);
      for (int64_t i = 0; i < count; ++i) {
        uint16_t* o = place(p_.o, row + i);
        for (int64_t c = 0; c < d_; c += kLanes)
          store(reinterpret_cast<bf16*>(o + c), load(out_ + i * d_ + c) * inverse[i]);
      }
    }
  }

  // With P the weights, dP = grad_o v^T and D = sum_j P dP: dS = scale P (dP - D), dq = dS k, dk = dS^T q, dv = P^T
  // grad_o.
  void backward(int64_t head) {
    at(head);
    read(p_.q, p_.q_stride, q_);
    read(p_.k, p_.k_stride, k_);
    read(p_.v, p_.v_stride, v_);
    read(p_.grad_o, p_.grad_stride, grad_);
    turn(k_, k_turned_);
    turn(v_, v_turned_);
    pair_rows(k_, d_, paired_, tokens_, d_);
    const float* lse = p_.lse + head * p_.T;
    for (int64_t row = 0; row < p_.T; row += kTile) {
      const int64_t seen = columns_of(row), count = rows_from(row);
      multiply(q_ + row * d_, d_, k_turned_, tokens_, d_, seen, scores_, tokens_);
      multiply(grad_ + row * d_, d_, v_turned_, tokens_, d_, seen, slopes_, tokens_);
      for (int64_t i = 0; i < count; ++i) slope_row(row + i, seen, i, lse[row + i]);
      multiply(slope_ + row * tokens_, tokens_, paired_, d_, seen, d_, out_, d_);
      write(p_.grad_q, row, count);
    }
    transposed_product(weights_, grad_, p_.grad_v);
    transposed_product(slope_, q_, p_.grad_k);
  }

 private:
  int64_t words() const { return (7 * size_ + 4 * kTile * tokens_ + 2 * kTile * d_ + 4 * tokens_ * tokens_) / 2 + 64; }
  void at(int64_t head) { sample_ = head / p_.H, head_ = head % p_.H; }
  int64_t rows_from(int64_t row) const { return p_.T - row < kTile ? p_.T - row : kTile; }
  int64_t keys_of(int64_t row) const { return p_.causal ? row + 1 : p_.T; }
  int64_t columns_of(int64_t row) const {  // whole tiles that the 16 rows from `row` on attend to
    const int64_t last = padded(row + kTile);
    return p_.causal && last < tokens_ ? last : tokens_;
  }
  uint16_t* place(uint16_t* base, int64_t token) const { return base + ((sample_ * p_.T + token) * p_.H + head_) * d_; }

  void read(const uint16_t* base, const int64_t* stride, uint16_t* to) const {  // rows behind T stay 0
    base += sample_ * stride[0] + head_ * stride[1];
    for (int64_t t = 0; t < p_.T; ++t) std::memcpy(to + t * d_, base + t * stride[2], sizeof(uint16_t) * d_);
  }
  void turn(const uint16_t* rows, uint32_t* turned) const {
    transpose(reinterpret_cast<const uint32_t*>(rows), d_ / 2, turned, tokens_, tokens_, d_ / 2);
  }
  void write(uint16_t* base, int64_t row, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* to = place(base, row + i);
      for (int64_t c = 0; c < d_; c += kLanes) store(reinterpret_cast<bf16*>(to + c), load(out_ + i * d_ + c));
    }
  }

  static vint lanes() {
    vint lane = {};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane;
  }

  float largest(const float* s, int64_t n) const {  // of the first n scores, scaled
    const vfloat none = broadcast(-std::numeric_limits<float>::infinity());
    vfloat highest = none;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) highest = max(highest, load(s + j) * p_.scale);
    if (j < n) highest = max(highest, lanes() < static_cast<int32_t>(n - j) ? load(s + j) * p_.scale : none);
    return reduce_max(highest);
  }
  // weights = exp(scale s - top) of the first n, 0 behind them; returns their sum
  float exponents(const float* s, int64_t n, int64_t columns, float top, uint16_t* weights) const {
    vfloat total = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const vfloat e = exp(load(s + j) * p_.scale - top);
      store(reinterpret_cast<bf16*>(weights + j), e);
      total += e;
    }
    for (; j < columns; j += kLanes) {
      const vfloat e = lanes() < static_cast<int32_t>(n - j) ? exp(load(s + j) * p_.scale - top) : vfloat{};
      store(reinterpret_cast<bf16*>(weights + j), e);
      total += e;
    }
    return reduce_add(total);
  }

  void slope_row(int64_t row, int64_t columns, int64_t i, float lse) {
    float *s = scores_ + i * tokens_, *slope = slopes_ + i * tokens_;
    uint16_t *weights = weights_ + row * tokens_, *result = slope_ + row * tokens_;
    const int64_t n = keys_of(row);
    vfloat sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const vfloat e = exp(load(s + j) * p_.scale - lse);
      const vfloat w = lanes() < static_cast<int32_t>(n - j < kLanes ? n - j : kLanes) ? e : vfloat{};
      store(s + j, w);
      store(reinterpret_cast<bf16*>(weights + j), w);
      sum += w * load(slope + j);
    }
    const float mean = reduce_add(sum);
    for (int64_t j = 0; j < columns; j += kLanes)
      store(reinterpret_cast<bf16*>(result + j), p_.scale * load(s + j) * (load(slope + j) - mean));
  }

  // m^T rows for all tokens: m (T, T), of which a row has its first columns_of, rows (T, d)
  void transposed_product(const uint16_t* m, const uint16_t* rows, uint16_t* to) {
    pair_rows(m, tokens_, pairs_, tokens_, tokens_);
    transpose(pairs_, tokens_, turned_, tokens_ / 2, tokens_ / 2, tokens_);
    pair_rows(rows, d_, paired_, tokens_, d_);
    for (int64_t row = 0; row < p_.T; row += kTile) {
      const int64_t first = p_.causal ? row / 32 * 32 : 0;  // no token before attends to these
      multiply(reinterpret_cast<const uint16_t*>(turned_) + row * tokens_ + first, tokens_, paired_ + first / 2 * d_,
               d_, tokens_ - first, d_, out_, d_);
      write(to, row, rows_from(row));
    }
  }

  const AttentionShortParams& p_;
  const int64_t d_, tokens_, size_;
  std::unique_ptr<uint16_t[]> memory_;
  int64_t sample_ = 0, head_ = 0;
  uint16_t *q_, *k_, *v_, *grad_, *weights_, *slope_;
  uint32_t *k_turned_, *v_turned_, *paired_, *turned_, *pairs_;
  float *scores_, *slopes_, *out_;
};

}  // namespace

void attention_short(const AttentionShortParams& p, int64_t begin, int64_t end) {
  Bf16::Session tiles;
  tiles.rows(kTile);
  Head head(p);
  for (int64_t i = begin; i < end; ++i) head.forward(i);
}

void attention_short_backward(const AttentionShortParams& p, int64_t begin, int64_t end) {
  Bf16::Session tiles;
  tiles.rows(kTile);
  Head head(p);
  for (int64_t i = begin; i < end; ++i) head.backward(i);
}

}  // namespace biflow::cpu::BIFLOW_ISA
