// SPDX-License-Identifier: BSD-3-Clause
// How the threads of a block work on one problem: in phases, each of which does the same for every
// thread, with a barrier behind it. The tests run a phase thread after thread, in several orders.
#pragma once

#include "../target.h"

namespace fastinit {
namespace cuda {

template <class S, uint32_t count>
struct Sums {
  static constexpr uint32_t kCount = count;
  S x[count];
  FI_FN Sums() {  // nvcc 13.0 does not come to an end with `= {}` in the class
#pragma unroll
    for (uint32_t i = 0; i < count; ++i) x[i] = 0;
  }
};

#if defined(__CUDACC__)

struct Block {
  FI_FN uint32_t threads() const { return blockDim.x; }

  template <class Phase>
  FI_FN void each(const Phase& phase) const {
    phase(threadIdx.x);
    __syncthreads();
  }

  // `then` gets what `phase` returned, summed over the `lanes` threads next to each other.
  template <uint32_t lanes, class Phase, class Then>
  FI_FN void sum(const Phase& phase, const Then& then) const {
    auto sums = phase(threadIdx.x);
#pragma unroll
    for (uint32_t step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (uint32_t i = 0; i < sums.kCount; ++i) {
        sums.x[i] += __shfl_xor_sync(0xFFFFFFFFu, sums.x[i], step);
      }
    }
    then(threadIdx.x, sums);
    __syncthreads();
  }
};

// The compiler sees that it is global memory, and needs no generic loads and stores.
template <class T>
FI_FN T* global(uint64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(address));
}

FI_FN float root(float x) { return __fsqrt_rn(x); }
FI_FN double root(double x) { return __dsqrt_rn(x); }

#endif

}  // namespace cuda
}  // namespace fastinit
