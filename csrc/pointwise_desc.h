// SPDX-License-Identifier: BSD-3-Clause
// The contract of arithmetic in place (fastinit/cpu/pointwise.py packs it): what torch's operators
// with numbers do to each element, where each result is one rounding of the exact one, and erfinv_.
#pragma once

#include <cstdint>

#include "fill_desc.h"

namespace fastinit {

constexpr int kMostSteps = 8;

enum class Arithmetic : uint8_t {
  multiply,  // x * number
  divide,    // x / number
  add,       // x + number
  at_least,  // number if x is less, else x, as what is not a number
  at_most,   // number if x is more, else x
  erfinv,    // by the function that torch calls
};
constexpr Code kArithmetic[] = {FI_CODE(Arithmetic, multiply), FI_CODE(Arithmetic, divide),
                                FI_CODE(Arithmetic, add),      FI_CODE(Arithmetic, at_least),
                                FI_CODE(Arithmetic, at_most),  FI_CODE(Arithmetic, erfinv)};

struct PointwiseDesc {
  uint64_t address;  // of the first element; owned by the caller, who keeps the tensor alive
  int64_t items;     // one beside the other
  uint64_t erfinv;   // the address of MKL's v?ErfInv, if it is among the steps
  double number[kMostSteps];
  Arithmetic op[kMostSteps];
  Dtype dtype;  // f32 or f64
  uint8_t steps;
  uint8_t unused[6];
};
FI_LAYOUT(PointwiseDesc, FI_FIELD(address), FI_FIELD(items), FI_FIELD(erfinv), FI_FIELD(number),
          FI_FIELD(op), FI_FIELD(dtype), FI_FIELD(steps), FI_UNUSED(unused));

}  // namespace fastinit
