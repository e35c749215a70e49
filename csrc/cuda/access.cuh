// Vectors in global memory whose addresses may not suit them.
#pragma once

#include "arch/arch.cuh"

namespace biflow::cuda {

// A vector as one access, or as its elements where addresses are not aligned to it.
template <bool kAligned, class T, int V>
BIFLOW_DEVICE void load_vector(T (&to)[V], const T* from) {
  if constexpr (kAligned) {
    const auto v = arch::Vector<T, V>::load(from);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = v.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = arch::Vector<T, 1>::load(from + i).v[0];
  }
}
template <bool kAligned, class T, int V>
BIFLOW_DEVICE void store_vector(const T (&from)[V], T* to) {
  if constexpr (kAligned) {
    arch::Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.v[i] = from[i];
    v.store_global(to);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) arch::Vector<T, 1>{{from[i]}}.store(to + i);
  }
}

}  // namespace biflow::cuda
