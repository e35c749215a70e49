// Conformance: fragments, tensor cores, arithmetic. See conformance.cu.
#include <cmath>
#include <limits>

#include "emulator/testing.h"

namespace biflow::test {
namespace {

// --- tensor cores ---------------------------------------------------------------------------------------------------

// d = a b + c of one warp, each element where the comment in arch/device.cuh says.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) { return arch::pack<T>(arch::to_float(low), arch::to_float(high)); };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
    left[i] = pair(a[row * 16 + k], a[row * 16 + k + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * t + i * 8;
    right[i] = pair(b[k * 8 + g], b[(k + 1) * 8 + g]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  arch::mma_m16n8k16<T>(sum, left, right, sum);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The largest error of a product, in units of the sum of its terms' magnitudes.
template <class T>
double product_error(const std::vector<float>& left, const std::vector<float>& right, const std::vector<float>& sum) {
  const auto a = convert<T>(left), b = convert<T>(right);
  Device<T> device_a(a), device_b(b);
  Device<float> c(sum), d(16 * 8);
  require(
      arch::launch(mma_kernel<T>, dim3(1), dim3(32), 0, nullptr, device_a.read(), device_b.read(), c.read(), d.get()));
  const auto got = d.values();
  double worst = 0;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double wanted = sum[row * 8 + column], size = std::fabs(wanted);
      for (int k = 0; k < 16; ++k) {
        const double term = static_cast<double>(arch::to_float(a[row * 16 + k])) * arch::to_float(b[k * 8 + column]);
        wanted += term, size += std::fabs(term);
      }
      worst = std::fmax(worst, std::fabs(got[row * 8 + column] - wanted) / (size > 0 ? size : 1));
    }
  }
  return worst;
}

template <class T>
void test_mma(const char* name) {
  // small integers: every order of summing is exact, so a permuted fragment cannot hide
  std::vector<float> a(256), b(128), c(128);
  for (auto* values : {&a, &b, &c}) {
    for (float& v : *values) v = static_cast<float>(static_cast<int>(generator() % 17) - 8);
  }
  expect(std::string(name) + ", exact on integers", product_error<T>(a, b, c) == 0);
  // tensor cores align the terms of a sum and truncate: up to 2^-23 of the largest for each of 17
  bool passed = true;
  for (int i = 0; i < 20; ++i) {
    passed &= product_error<T>(random_floats(256), random_floats(128), random_floats(128)) < std::ldexp(1.0, -20);
  }
  expect(std::string(name) + ", rounding", passed);
}

// --- ldmatrix -------------------------------------------------------------------------------------------------------

// Four matrices with rows of 8 elements, 24 apart; lanes 8 m .. 8 m + 7 name the rows of matrix m.
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  BIFLOW_SHARED(uint4, storage, [32 * 3]);  // 16-byte aligned
  auto rows = reinterpret_cast<uint16_t*>(storage);
  const int t = threadIdx.x;
  for (int i = t; i < 32 * 24; i += 32) rows[i] = in[i];
  __syncwarp();
  uint32_t four[4], two[2];
  arch::ldmatrix_x4(four, rows + 24 * t);
  for (int i = 0; i < 4; ++i) out[t * 12 + i] = four[i];
  arch::ldmatrix_x4_transposed(four, rows + 24 * t);
  for (int i = 0; i < 4; ++i) out[t * 12 + 4 + i] = four[i];
  arch::ldmatrix_x2(two, rows + 24 * (t % 16));
  for (int i = 0; i < 2; ++i) out[t * 12 + 8 + i] = two[i];
  arch::ldmatrix_x2_transposed(two, rows + 24 * (t % 16));
  for (int i = 0; i < 2; ++i) out[t * 12 + 10 + i] = two[i];
}

void test_ldmatrix() {
  const auto in = random_bits<uint16_t>(32 * 24);
  Device<uint16_t> source(in);
  Device<uint32_t> out(32 * 12);
  require(arch::launch(ldmatrix_kernel, dim3(1), dim3(32), 0, nullptr, source.read(), out.get()));
  const auto got = out.values();
  const char* names[] = {"ldmatrix_x4", "ldmatrix_x4_transposed", "ldmatrix_x2", "ldmatrix_x2_transposed"};
  const int first[] = {0, 4, 8, 10, 12};
  for (int form = 0; form < 4; ++form) {
    bool passed = true;
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < first[form + 1] - first[form]; ++m) {
        const int i = lane / 4, j = lane % 4 * 2;
        const auto element = [&](int row, int column) { return uint32_t{in[(m * 8 + row) * 24 + column]}; };
        const uint32_t wanted =
            form % 2 ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
        passed &= got[lane * 12 + first[form] + m] == wanted;
      }
    }
    expect(names[form], passed);
  }
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

constexpr int kFunctions = 12;

__global__ void functions_kernel(const float* x, const float* y, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float a = x[i], b = y[i], size = fabsf(a) + 0.01f;
  float* r = out + i * kFunctions;
  r[0] = arch::exp2_fast(a);
  r[1] = __expf(a);
  r[2] = __logf(size);
  r[3] = rsqrtf(size);
  r[4] = __fdividef(b, size);
  r[5] = __frcp_rn(size);
  r[6] = __fsqrt_rn(size);
  r[7] = __fmaf_rn(a, b, size);
  r[8] = __saturatef(a);
  r[9] = min(a, b);
  r[10] = max(a, b);
  r[11] = arch::rsqrt_fast(size);
}

void test_functions() {
  const int n = 500;
  const auto x = random_floats(n, -20, 20), y = random_floats(n, -2, 2);
  Device<float> dx(x), dy(y), out(n * kFunctions);
  require(arch::launch(functions_kernel, dim3(4), dim3(128), 0, nullptr, dx.read(), dy.read(), out.get(), n));
  const auto got = out.values();
  // error bounds: CUDA's (Programming Guide, "Mathematical Functions"), relative unless the result is near 0
  const char* names[] = {"exp2_fast",  "__expf",    "__logf",      "rsqrtf", "__fdividef", "__frcp_rn",
                         "__fsqrt_rn", "__fmaf_rn", "__saturatef", "min",    "max",        "rsqrt_fast"};
  const double bound[] = {4e-7, 5e-6, 4e-7, 3e-7, 3e-7, 0, 0, 0, 0, 0, 0, 3e-7};
  for (int f = 0; f < kFunctions; ++f) {
    double worst = 0;
    for (int i = 0; i < n; ++i) {
      const float a = x[i], b = y[i], size = std::fabs(a) + 0.01f;
      const double exact[] = {std::exp2(static_cast<double>(a)),
                              std::exp(static_cast<double>(a)),
                              std::log(static_cast<double>(size)),
                              1 / std::sqrt(static_cast<double>(size)),
                              static_cast<double>(b) / size,
                              1.0f / size,
                              std::sqrt(size),
                              std::fma(a, b, size),
                              std::fmin(std::fmax(a, 0.f), 1.f),
                              std::fmin(a, b),
                              std::fmax(a, b),
                              1 / std::sqrt(static_cast<double>(size))};
      const double scale = std::fmax(std::fabs(exact[f]), f == 2 ? 1.0 : 1e-30);
      worst = std::fmax(worst, std::fabs(got[i * kFunctions + f] - exact[f]) / scale);
    }
    expect(names[f], worst <= bound[f]);
  }
}

__global__ void special_kernel(const float* x, float* out) {
  out[0] = min(x[0], 1.0f);  // of a NaN and a number: the number
  out[1] = max(x[0], 1.0f);
  out[2] = __saturatef(x[0]);      // 0
  out[3] = arch::exp2_fast(x[1]);  // 2^-inf
  out[4] = arch::exp2_fast(x[2]);  // 2^-140, denormal: flushed
  out[5] = __fdividef(8.0f, 0x1.8p126f);
}

__global__ void bits_kernel(const float* x, const int* n, int* out) {
  const int t = threadIdx.x;
  out[t * 8 + 0] = __float_as_int(x[t]);
  out[t * 8 + 1] = static_cast<int>(__float_as_uint(x[t]));
  out[t * 8 + 2] = __int_as_float(__float_as_int(x[t])) == x[t];
  out[t * 8 + 3] = __uint_as_float(__float_as_uint(x[t])) == x[t];
  out[t * 8 + 4] = __popc(static_cast<unsigned>(n[t]));
  out[t * 8 + 5] = __ffs(n[t]);
  out[t * 8 + 6] = __clz(n[t]);
  out[t * 8 + 7] = min(n[t], 5) + 1000 * max(n[t] & 0xff, 7);
}

void test_bits() {
  Device<float> x(
      std::vector<float>{std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), -140.0f}),
      special(6);
  require(arch::launch(special_kernel, dim3(1), dim3(1), 0, nullptr, x.read(), special.get()));
  expect("min, max, __saturatef of NaN, exp2_fast of -inf and -140, __fdividef by 2^126",
         special.values() == std::vector<float>({1, 1, 0, 0, 0, 0}));

  const auto values = random_floats(32, -1e6f, 1e6f);
  std::vector<int> n(32);
  for (int i = 0; i < 32; ++i) n[i] = i == 0 ? 0 : static_cast<int>(generator()) & ~((1 << i % 9) - 1);
  Device<float> source(values);
  Device<int> numbers(n), out(32 * 8);
  require(arch::launch(bits_kernel, dim3(1), dim3(32), 0, nullptr, source.read(), numbers.read(), out.get()));
  const auto got = out.values();
  bool passed[3] = {true, true, true};
  for (int i = 0; i < 32; ++i) {
    int bits, ones = 0, lowest = 0, zeros = 32;
    std::memcpy(&bits, &values[i], 4);
    for (int b = 0; b < 32; ++b) {
      if (!(static_cast<unsigned>(n[i]) >> b & 1)) continue;
      ++ones, zeros = 31 - b;
      if (lowest == 0) lowest = b + 1;
    }
    const int* r = &got[i * 8];
    passed[0] &= r[0] == bits && r[1] == bits && r[2] == 1 && r[3] == 1;
    passed[1] &= r[4] == ones && r[5] == lowest && r[6] == zeros;
    passed[2] &= r[7] == std::min(n[i], 5) + 1000 * std::max(n[i] & 0xff, 7);
  }
  expect("__float_as_int, __float_as_uint and back", passed[0]);
  expect("__popc, __ffs, __clz", passed[1]);
  expect("min, max of int", passed[2]);
}

template <class T>
__global__ void pack_kernel(const float* in, uint32_t* out) {
  out[threadIdx.x] = arch::pack<T>(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]);
}

template <class T>
bool packs() {
  const auto in = random_floats(64);
  Device<float> source(in);
  Device<uint32_t> out(32);
  require(arch::launch(pack_kernel<T>, dim3(1), dim3(32), 0, nullptr, source.read(), out.get()));
  const auto rounded = convert<T>(in);
  const auto got = out.values();
  return std::memcmp(got.data(), rounded.data(), 128) == 0;
}

}  // namespace

void test_tensor_cores() {
  test_mma<arch::bf16>("mma_m16n8k16 of bf16");
  test_mma<arch::half>("mma_m16n8k16 of half");
  test_ldmatrix();
}

void test_arithmetic() {
  test_functions();
  test_bits();
  expect("pack of bf16", packs<arch::bf16>());
  expect("pack of half", packs<arch::half>());
}

}  // namespace biflow::test
