// SPDX-License-Identifier: BSD-3-Clause
// How the threads of a block work on one problem: in phases, each of which does the same for every
// thread, with a barrier behind it. The tests run a phase thread after thread, in several orders.
#pragma once

#include "target.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

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

#else

class Block {
 public:
  // `order`: of the threads within a phase, which must not matter. 0: as numbered, 1: backwards,
  // 2: shuffled.
  Block(uint32_t threads, int order) : threads_(threads), order_(order) {}
  uint32_t threads() const { return threads_; }

  template <class Phase>
  void each(const Phase& phase) const {
    for (uint32_t i = 0; i < threads_; ++i) phase(thread(i));
  }

  template <uint32_t lanes, class Phase, class Then>
  void sum(const Phase& phase, const Then& then) const {
    std::vector<decltype(phase(0u))> sums(threads_);
    for (uint32_t i = 0; i < threads_; ++i) sums[thread(i)] = phase(thread(i));
    for (uint32_t step = lanes / 2; step > 0; step /= 2) {
      const auto before = sums;
      for (uint32_t t = 0; t < threads_; ++t) {
        for (uint32_t i = 0; i < before[t].kCount; ++i) {
          sums[t].x[i] = before[t].x[i] + before[t ^ step].x[i];
        }
      }
    }
    for (uint32_t i = 0; i < threads_; ++i) then(thread(i), sums[thread(i)]);
  }

 private:
  uint32_t thread(uint32_t i) const {  // blocks have 64, 256, ... threads: odd factors permute them
    return order_ == 0 ? i : order_ == 1 ? threads_ - 1 - i : (i * 37 + 11) % threads_;
  }
  uint32_t threads_;
  int order_;
};

template <class T>
T* global(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

inline float root(float x) { return std::sqrt(x); }
inline double root(double x) { return std::sqrt(x); }

#endif

}  // namespace cuda
}  // namespace fastinit
