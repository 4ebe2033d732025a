// SPDX-License-Identifier: BSD-3-Clause
// The contract of the keyed stream between Python (fastinit/keyed.py packs it) and the kernels:
// what to write, where, and which elements of the whole parameter these are.
#pragma once

#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace fastinit {

constexpr int kMostDims = 5;

// Along it, elements lie `stride` apart in memory and `step` apart in the whole parameter.
struct KeyedDim {
  int64_t size, stride, step;
};

struct KeyedFill {
  uint64_t address;  // of the first element; owned by the caller, who keeps the tensor alive
  uint64_t key;      // of the parameter: Philox's key
  uint64_t index;    // of the first element in the whole parameter, row-major
  uint64_t items;    // the product of the sizes
  // constant: value. uniform: from, to, the largest value below to. normal: mean, std.
  // trunc_normal: mean, std, lo, hi, and how much of the distribution lies below lo, between,
  // above.
  double p[7];
  KeyedDim dim[kMostDims];  // smallest step first
  union {
    Diagonal diagonal;  // of the whole parameter
    Sparse sparse;      // of a whole matrix; items are its columns
  };
  Op op;  // constant, diagonal, uniform, normal, trunc_normal or sparse_mask
  Dtype dtype;
  uint8_t rank;  // dimensions; at least one
  uint8_t unused[5];
};
static_assert(sizeof(KeyedFill) == 280 && std::is_trivially_copyable<KeyedFill>::value,
              "fastinit/keyed.py packs 280 bytes");

}  // namespace fastinit
