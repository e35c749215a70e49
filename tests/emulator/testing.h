// What the programs conformance.cu and defects.cu share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "arch/arch.cuh"

namespace biflow::test {

inline void require(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("CUDA error %d: %s\n", static_cast<int>(status), cudaGetErrorString(status));
  std::exit(2);
}

inline std::mt19937 generator(7);

inline int& failed_checks() {
  static int count = 0;
  return count;
}

inline void expect(const std::string& name, bool passed) {
  std::printf("%s %s\n", passed ? "passed" : "FAILED", name.c_str());
  failed_checks() += !passed;
}

template <class T>
std::vector<T> random_bits(size_t count) {
  std::vector<T> values(count);
  for (T& v : values) v = static_cast<T>(generator());
  return values;
}

inline std::vector<float> random_floats(size_t count, float low = -1, float high = 1) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(count);
  for (float& v : values) v = uniform(generator);
  return values;
}

template <class T>
std::vector<T> convert(const std::vector<float>& values) {
  std::vector<T> converted(values.size());
  for (size_t i = 0; i < values.size(); ++i) converted[i] = arch::from_float<T>(values[i]);
  return converted;
}

// An array on the device.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    require(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* get() const { return data_; }
  const T* read() const { return data_; }

  std::vector<T> values() const {
    require(cudaDeviceSynchronize());
    std::vector<T> copy(count_);
    require(cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// The groups of checks that are in files of their own.
void test_memory();        // conformance_memory.cu
void test_tensor_cores();  // conformance_mma.cu
void test_arithmetic();
void test_blocks();  // conformance_grid.cu

}  // namespace biflow::test
