// SPDX-License-Identifier: BSD-3-Clause
// The contract of the keyed stream between Python (fastinit/cpu/keyed.py packs it) and the kernels:
// what to write, where, and which elements of the whole parameter these are.
#pragma once

#include <cstdint>

#include "fill_desc.h"

namespace fastinit {

constexpr int kMostDims = 5;

// Along it, elements lie `stride` apart in memory and `step` apart in the whole parameter.
struct KeyedDim {
  int64_t size, stride, step;
};
FI_LAYOUT(KeyedDim, FI_FIELD(size), FI_FIELD(stride), FI_FIELD(step));

struct KeyedDesc {
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
FI_LAYOUT(KeyedDesc, FI_FIELD(address), FI_FIELD(key), FI_FIELD(index), FI_FIELD(items),
          FI_FIELD(p), FI_FIELD(dim), FI_FIELD(diagonal), FI_FIELD(op), FI_FIELD(dtype),
          FI_FIELD(rank), FI_UNUSED(unused));

}  // namespace fastinit
