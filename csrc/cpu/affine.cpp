// The affine coupling on a CPU: one pass over memory. A chunk goes through pieces that fit the L1 cache. A piece's
// params are first rewritten in a scratch as separate float rows a and b, whatever their layout, dtype and D are, so
// that the arithmetic always runs over full vectors; the copy also keeps more loads in flight than arithmetic on memory
// in place (0.8 against 1.0 ns an element beyond the caches). A backward with long fp32 rows works in place: it has as
// much to write.
#include "affine.h"

#include "cpu/affine_math.h"
#include "cpu/rows.h"

namespace biflow::cpu::BIFLOW_ISA {
namespace {

constexpr int64_t kPiece = 1024;         // elements that a piece holds at most
constexpr int64_t kDirectChannels = 64;  // from here on a backward uses a token's params in place

template <class S>
using Vector = typename VectorOf<S>::type;

template <class S>
struct Scratch {  // one vector of room behind each row: copies into it run in whole vectors
  alignas(64) S a[kPiece + kLanes];
  alignas(64) S b[kPiece + kLanes];
  alignas(64) S input[kPiece + kLanes];
  alignas(64) S output[kPiece + kLanes];
};

// ---- arithmetic over n elements in separate rows

template <class S>
inline void keep_lanes(Vector<S>& v, int n) {  // zero in the lanes behind n, which hold no element
  if constexpr (VectorOf<S>::lanes > 1)
    for (int i = n; i < kLanes; ++i) v[i] = 0;
}

// Outputs larger than this bypass the caches: nothing of them would be left there for a reader, and a cached store
// reads the line it is about to overwrite.
constexpr int64_t kStreamBytes = 16 << 20;

inline void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
inline void stream(double* p, double v) { store(p, v); }

template <class P, class V, class N>
void put(P* p, V v, N m, bool streamed) {  // streamed: p is aligned to a vector
  if constexpr (std::is_same_v<N, int>)
    store_n(p, v, m);
  else if (streamed)
    stream(p, v);
  else
    store_n(p, v, m);
}

inline bool vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class S>
struct Forward {
  const S *a, *b, *input;
  S* output;
  S c;
  bool large;        // output goes around the caches
  Vector<S> logdet;  // running sum per lane
};

template <class S, bool kEncode, bool kLogdet, ScaleMap kMap, Clip kClip, bool kClipB>
void forward_rows(Forward<S>& r, int64_t n) {
  using V = Vector<S>;
  const V c = constant<V>(r.c);
  const bool streamed = r.large && vector_aligned(r.output);
  each_vector<S>(n, [&](int64_t i, auto m) {
    const auto s = scale_map<kMap>(clip<kClip>(load_n(r.a + i, m), c));
    const V b = clip<kClipB ? kClip : Clip::none>(load_n(r.b + i, m), c);
    const V v = load_n(r.input + i, m);
    put(r.output + i, kEncode ? (v - b) * s.inverse : v * s.sigma + b, m, streamed);
    if constexpr (kLogdet) {
      V log = s.log;
      if constexpr (std::is_same_v<decltype(m), int>) keep_lanes<S>(log, m);
      r.logdet -= log;
    }
  });
}

template <class S>
struct Backward {
  const S *a, *b, *input, *grad_output;
  S *grad_a, *grad_b, *grad_input;  // may be the rows read
  S c, grad_logdet;
  bool large;  // what is not scratch goes around the caches
};

template <class S, bool kEncode, ScaleMap kMap, Clip kClip, bool kClipB>
void backward_rows(Backward<S>& r, int64_t n) {
  using V = Vector<S>;
  constexpr Clip kind_b = kClipB ? kClip : Clip::none;
  const V c = constant<V>(r.c), gl = constant<V>(r.grad_logdet);
  const bool streamed = r.large && vector_aligned(r.grad_input);
  const bool streamed_params = r.large && r.grad_a != r.a && vector_aligned(r.grad_a) && vector_aligned(r.grad_b);
  each_vector<S>(n, [&](int64_t i, auto m) {
    const V a = load_n(r.a + i, m), b = load_n(r.b + i, m), v = load_n(r.input + i, m),
            g = load_n(r.grad_output + i, m);
    const auto s = scale_map<kMap>(clip<kClip>(a, c));
    const V to_input = g * (kEncode ? s.inverse : s.sigma);
    const V moved = kEncode ? v - clip<kind_b>(b, c) : v;  // what sigma multiplies or divides
    const V to_log = kEncode ? -(to_input * moved + gl) : to_input * moved - gl;
    put(r.grad_input + i, to_input, m, streamed);
    put(r.grad_b + i, (kEncode ? -to_input : g) * clip_gradient<kind_b>(b, c), m, streamed_params);
    put(r.grad_a + i, to_log * s.log_gradient * clip_gradient<kClip>(a, c), m, streamed_params);
  });
}

// ---- between memory and scratch

template <class S>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + VectorOf<S>::lanes - 1) / VectorOf<S>::lanes * VectorOf<S>::lanes;
}

// Copies n elements with conversion; with `room`, both sides may be touched up to a whole number of vectors.
template <class S, class From, class To>
inline void copy_row(const From* from, To* to, int64_t n, bool room) {
  if (room)
    for (int64_t i = 0; i < n; i += VectorOf<S>::lanes) store(to + i, load(from + i));
  else
    each_vector<S>(n, [&](int64_t i, auto m) { store_n(to + i, load_n(from + i, m), m); });
}

// (s0 t0 s1 t1 ..) <-> (s0 s1 ..), (t0 t1 ..), n of each
template <class S, class Net>
void unpack_pairs(const Net* from, S* even, S* odd, int64_t n) {
  if constexpr (std::is_same_v<S, double>) {
    for (int64_t i = 0; i < n; ++i) even[i] = from[2 * i], odd[i] = from[2 * i + 1];
  } else {
    const auto step = [&](vfloat low, vfloat high, int64_t i) {
      vfloat e, o;
      split_pairs(low, high, e, o);
      store(even + i, e);
      store(odd + i, o);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(load(from + 2 * i), load(from + 2 * i + kLanes), i);
    if (i == n) return;
    float pair[2 * kLanes] = {};
    copy_row<float>(from + 2 * i, pair, 2 * (n - i), false);
    step(load(pair), load(pair + kLanes), i);  // the scratch has room for a whole vector
  }
}
template <class S, class Net>
void pack_pairs(const S* even, const S* odd, Net* to, int64_t n) {
  if constexpr (std::is_same_v<S, double>) {
    for (int64_t i = 0; i < n; ++i) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
  } else {
    int64_t i = 0;
    vfloat low, high;
    for (; i + kLanes <= n; i += kLanes) {
      join_pairs(load(even + i), load(odd + i), low, high);
      store(to + 2 * i, low);
      store(to + 2 * i + kLanes, high);
    }
    if (i == n) return;
    float pair[2 * kLanes];
    join_pairs(load(even + i), load(odd + i), low, high);
    store(pair, low);
    store(pair + kLanes, high);
    copy_row<float>(pair, to + 2 * i, 2 * (n - i), false);
  }
}

// ---- one chunk

// Part of a chunk: whole tokens [token, token + tokens), or `channels` channels from `channel` on of one token.
struct Piece {
  int64_t token, tokens, channel, channels;
  int64_t size() const { return tokens * channels; }
};

template <class S, class Data, class Net>
class Chunk {
 public:
  Chunk(const AffineParams& p, int64_t index) : p(p), D(p.D), sample(index / p.chunks_per_sample()) {
    const int64_t n = p.tokens_per_chunk();
    begin = index % p.chunks_per_sample() * n;
    end = begin + n < p.T ? begin + n : p.T;
    step = !p.options.causal ? 0 : p.options.flip ? 1 : -1;
    pairs = p.options.layout == Layout::interleaved || D == 1;
    swapped = p.options.layout == Layout::shift_scale;
    direct = p.grad_params && std::is_same_v<S, Net> && !pairs && D >= kDirectChannels;
  }

  // Calls piece(Piece) for what is transformed and pass(first token, tokens) for what the mask leaves alone.
  template <class F, class G>
  void walk(F&& piece, G&& pass) const {
    for (int64_t t = begin; t < end;) {
      int64_t stop = end;
      if (p.mask) {
        const bool* mask = p.mask + sample * p.T;
        for (stop = t + 1; stop < end && mask[stop] == mask[t];) ++stop;
        if (!mask[t]) {
          pass(t, stop - t);
          t = stop;
          continue;
        }
      }
      // tokens in a piece; 0: a token takes several pieces. A multiple of 16 keeps pieces aligned
      const int64_t most = direct ? 1 : kPiece / D >= 16 ? kPiece / D / 16 * 16 : kPiece / D;
      while (t < stop) {
        if (most > 0 && D <= kPiece) {
          const int64_t m = most < stop - t ? most : stop - t;
          piece(Piece{t, m, 0, D});
          t += m;
        } else {
          for (int64_t d = 0; d < D; d += kPiece) piece(Piece{t, 1, d, kPiece < D - d ? kPiece : D - d});
          ++t;
        }
      }
    }
  }

  template <class T>
  T* data(T* base, int64_t token, int64_t channel = 0) const {
    return base + (sample * p.T + token) * D + channel;
  }
  const Data* input(int64_t token, int64_t channel = 0) const {
    return data(static_cast<const Data*>(p.input), token, channel);
  }

  // The params row that token t reads is t + step; the first token in block order has none.
  bool has_row(int64_t token) const { return token + step >= 0 && token + step < p.T; }
  template <class T>
  T* row(T* params, int64_t token) const {
    return params + (sample * p.T + token + step) * 2 * D;
  }

  // Rows of a and b for a piece: in place if memory has them that way, else in the scratch.
  void read_params(const Piece& q, Scratch<S>& scratch, const S*& a, const S*& b) const {
    int64_t lo = q.token, hi = q.token + q.tokens;
    if (!has_row(lo)) ++lo;
    if (hi > lo && !has_row(hi - 1)) --hi;
    const Net* params = static_cast<const Net*>(p.params);
    if (direct && hi > lo) {
      if constexpr (std::is_same_v<S, Net>) {
        const S* first = row(params, lo) + q.channel;
        a = swapped ? first + D : first;
        b = swapped ? first : first + D;
      }
      return;
    }
    a = scratch.a, b = scratch.b;
    const int64_t skip = (lo - q.token) * q.channels, n = (hi - lo) * q.channels;
    if (n > 0) {
      const Net* from = row(params, lo) + q.channel * (pairs ? 2 : 1);
      S* first = (swapped ? scratch.b : scratch.a) + skip;
      S* second = (swapped ? scratch.a : scratch.b) + skip;
      if (pairs) {
        unpack_pairs(from, first, second, n);
      } else {
        const int64_t limit = p.B * p.T * 2 * D - whole_vectors<S>(q.channels);  // may be negative
        for (int64_t i = 0, at = from - params; i < hi - lo; ++i, at += 2 * D) {
          copy_row<S>(params + at, first + i * D, q.channels, at <= limit);
          copy_row<S>(params + at + D, second + i * D, q.channels, at + D <= limit);
        }
      }
    }
    // after the rows, whose copies may run past their end
    for (int64_t i = 0; i < skip; ++i) scratch.a[i] = scratch.b[i] = 0;
    for (int64_t i = skip + (n > 0 ? n : 0); i < q.size(); ++i) scratch.a[i] = scratch.b[i] = 0;
  }

  // Where the gradients of a piece's params go: straight to memory, or into the scratch for write_grad_params.
  void place_grad_params(const Piece& q, Scratch<S>& scratch, S*& grad_a, S*& grad_b) const {
    grad_a = scratch.a, grad_b = scratch.b;
    if constexpr (std::is_same_v<S, Net>)
      if (direct && has_row(q.token)) {
        S* first = row(static_cast<S*>(p.grad_params), q.token) + q.channel;
        grad_a = swapped ? first + D : first;
        grad_b = swapped ? first : first + D;
      }
  }
  void write_grad_params(const Piece& q, const Scratch<S>& scratch) const {
    int64_t lo = q.token, hi = q.token + q.tokens;
    if (!has_row(lo)) ++lo;
    if (hi > lo && !has_row(hi - 1)) --hi;
    if (direct || hi <= lo) return;
    const int64_t skip = (lo - q.token) * q.channels;
    const S* first = (swapped ? scratch.b : scratch.a) + skip;
    const S* second = (swapped ? scratch.a : scratch.b) + skip;
    Net* to = row(static_cast<Net*>(p.grad_params), lo) + q.channel * (pairs ? 2 : 1);
    if (pairs) return pack_pairs(first, second, to, (hi - lo) * q.channels);
    // ascending, so that what a vector writes too far is overwritten by its owner; nothing past the piece's last row
    const int64_t limit = q.channels == D ? (hi - lo) * 2 * D - whole_vectors<S>(D) : -1;
    for (int64_t i = 0, at = 0; i < hi - lo; ++i, at += 2 * D) {
      copy_row<S>(first + i * D, to + at, q.channels, at <= limit);
      copy_row<S>(second + i * D, to + at + D, q.channels, at + D <= limit);
    }
  }

  void zero_grad_row(int64_t row) const {
    Net* to = static_cast<Net*>(p.grad_params) + (sample * p.T + row) * 2 * D;
    std::memset(to, 0, sizeof(Net) * 2 * D);
  }

  // A row of data as S: in place, or converted into `room`.
  const S* read(const Data* from, S* room, int64_t n) const {
    if constexpr (std::is_same_v<S, Data>) {
      return from;
    } else {
      copy_row<S>(from, room, n, false);
      return room;
    }
  }
  S* place(Data* to, S* room) const {
    if constexpr (std::is_same_v<S, Data>)
      return to;
    else
      return room;
  }
  void write(const S* room, Data* to, int64_t n) const {
    if constexpr (!std::is_same_v<S, Data>) copy_row<S>(room, to, n, false);
  }

  const AffineParams& p;
  const int64_t D, sample;
  int64_t begin, end;  // tokens
  int64_t step;        // from a token to the params row it reads
  bool pairs;          // a and b alternate in memory
  bool swapped;        // b comes before a
  bool direct;         // params are used where they are
};

template <class S, class Data, class Net>
void run_forward(const AffineParams& p, int64_t index, void (*rows)(Forward<S>&, int64_t)) {
  const Chunk<S, Data, Net> chunk(p, index);
  Scratch<S> scratch;
  Data* output = static_cast<Data*>(p.output);
  Forward<S> r{};
  r.c = static_cast<S>(p.options.clip_value);
  r.large = std::is_same_v<S, Data> && p.B * p.T * p.D * int64_t(sizeof(Data)) >= kStreamBytes;
  double logdet = 0;
  int64_t pending = 0;
  const auto flush = [&] {
    logdet += reduce_add(r.logdet);
    r.logdet = Vector<S>{};
    pending = 0;
  };
  chunk.walk(
      [&](const Piece& q) {
        const int64_t n = q.size();
        Data* to = chunk.data(output, q.token, q.channel);
        chunk.read_params(q, scratch, r.a, r.b);
        r.input = chunk.read(chunk.input(q.token, q.channel), scratch.input, n);
        r.output = chunk.place(to, scratch.output);
        rows(r, n);
        chunk.write(r.output, to, n);
        if ((pending += n) >= kPiece) flush();
      },
      [&](int64_t token, int64_t tokens) {
        std::memcpy(chunk.data(output, token), chunk.input(token), sizeof(Data) * tokens * p.D);
      });
  flush();
  finish_streams();
  if (p.partial) p.partial[index] = logdet;
}

template <class S, class Data, class Net>
void run_backward(const AffineParams& p, int64_t index, void (*rows)(Backward<S>&, int64_t)) {
  const Chunk<S, Data, Net> chunk(p, index);
  Scratch<S> scratch;
  const Data* grad_output = static_cast<const Data*>(p.grad_output);
  Data* grad_input = static_cast<Data*>(p.grad_input);
  Backward<S> r{};
  r.c = static_cast<S>(p.options.clip_value);
  r.large = std::is_same_v<S, Data> && p.B * p.T * p.D * int64_t(sizeof(Data)) >= kStreamBytes;
  r.grad_logdet = p.grad_logdet ? static_cast<const S*>(p.grad_logdet)[chunk.sample] : S(0);
  chunk.walk(
      [&](const Piece& q) {
        const int64_t n = q.size();
        Data* to = chunk.data(grad_input, q.token, q.channel);
        chunk.read_params(q, scratch, r.a, r.b);
        r.input = chunk.read(chunk.input(q.token, q.channel), scratch.input, n);
        r.grad_output = chunk.read(chunk.data(grad_output, q.token, q.channel), scratch.output, n);
        r.grad_input = chunk.place(to, scratch.output);
        chunk.place_grad_params(q, scratch, r.grad_a, r.grad_b);
        rows(r, n);
        chunk.write(r.grad_input, to, n);
        chunk.write_grad_params(q, scratch);
      },
      [&](int64_t token, int64_t tokens) {
        std::memcpy(chunk.data(grad_input, token), chunk.data(grad_output, token), sizeof(Data) * tokens * p.D);
        for (int64_t t = token; t < token + tokens; ++t)
          if (chunk.has_row(t)) chunk.zero_grad_row(t + chunk.step);
      });
  finish_streams();
  const int64_t last = p.options.flip ? 0 : p.T - 1;  // in block order: its params are read by no token
  if (p.options.causal && last >= chunk.begin && last < chunk.end) chunk.zero_grad_row(last);
}

// ---- choice of types and options

template <bool kEncode, bool kBackward, class S, class Data, class Net>
void run(const AffineParams& p, int64_t begin, int64_t end) {
  with_affine_options(p.options, [&](auto map, auto kind, auto both) {
    if constexpr (kBackward) {
      for (int64_t i = begin; i < end; ++i)
        run_backward<S, Data, Net>(p, i, &backward_rows<S, kEncode, map.value, kind.value, both.value>);
    } else {
      const auto rows = p.partial ? &forward_rows<S, kEncode, true, map.value, kind.value, both.value>
                                  : &forward_rows<S, kEncode, false, map.value, kind.value, both.value>;
      for (int64_t i = begin; i < end; ++i) run_forward<S, Data, Net>(p, i, rows);
    }
  });
}

template <bool kEncode, bool kBackward, class Data>
void with_net(const AffineParams& p, int64_t begin, int64_t end) {
  switch (p.net) {
    case DType::f32:
      return run<kEncode, kBackward, float, Data, float>(p, begin, end);
    case DType::bf16:
      return run<kEncode, kBackward, float, Data, bf16>(p, begin, end);
    case DType::f16:
      return run<kEncode, kBackward, float, Data, f16>(p, begin, end);
    case DType::f64:
      return;  // refused by the caller
  }
}

template <bool kEncode, bool kBackward>
void with_data(const AffineParams& p, int64_t begin, int64_t end) {
  switch (p.data) {
    case DType::f32:
      return with_net<kEncode, kBackward, float>(p, begin, end);
    case DType::bf16:
      return with_net<kEncode, kBackward, bf16>(p, begin, end);
    case DType::f16:
      return with_net<kEncode, kBackward, f16>(p, begin, end);
    case DType::f64:
      return run<kEncode, kBackward, double, double, double>(p, begin, end);
  }
}

}  // namespace

void affine_encode(const AffineParams& p, int64_t begin, int64_t end) { with_data<true, false>(p, begin, end); }
void affine_decode(const AffineParams& p, int64_t begin, int64_t end) { with_data<false, false>(p, begin, end); }
void affine_encode_backward(const AffineParams& p, int64_t begin, int64_t end) { with_data<true, true>(p, begin, end); }
void affine_decode_backward(const AffineParams& p, int64_t begin, int64_t end) {
  with_data<false, true>(p, begin, end);
}

void affine_logdet(const AffineParams& p) {
  const int64_t n = p.chunks_per_sample();
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += p.partial[b * n + i];
    if (p.data == DType::f64)
      static_cast<double*>(p.logdet)[b] = sum;
    else
      static_cast<float*>(p.logdet)[b] = static_cast<float>(sum);
  }
}

}  // namespace biflow::cpu::BIFLOW_ISA
