// SPDX-License-Identifier: BSD-3-Clause
// The contract between Python (fastinit/cpu/fills.py packs it) and the kernels: what to write,
// where, and which random words belong to it. Every decision is taken before; a kernel only obeys.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fastinit {

enum class Dtype : uint8_t { f32, f64, bf16, f16 };
template <Dtype dtype>
struct Typed {  // a dtype as a type
  static constexpr Dtype value = dtype;
};

// What one item is, and how many 32-bit words of its source it takes (f64 takes twice as many):
enum class Op : uint8_t {
  constant,      // item = element, no words.     a = value
  diagonal,      // item = element, no words.     eye_ and dirac_; the union is a Diagonal
  uniform,       // item = element, 1 word.       a = from, b = to
  normal,        // item = element, 1 word.       a = mean, b = std; torch's groups of 16
  normal_pairs,  // item = element, 4 per pair.   a = mean, b = std; torch's scalar Box-Muller
  trunc_normal,  // item = element, 1 per round.  as normal, redrawn while outside [lo, hi]
  sparse_mask,   // item = column, rows - 1.      zeroes part of each column; the union is a Sparse
  trunc_erfinv,  // item = element, 1 word.       CUDA only; trunc_normal_ before torch 2.12
};

// What Python calls them, which has the codes from here.
constexpr Code kDtypes[] = {FI_CODE(Dtype, f32), FI_CODE(Dtype, f64), FI_CODE(Dtype, bf16),
                            FI_CODE(Dtype, f16)};
constexpr Code kOps[] = {FI_CODE(Op, constant),     FI_CODE(Op, diagonal),
                         FI_CODE(Op, uniform),      FI_CODE(Op, normal),
                         FI_CODE(Op, normal_pairs), FI_CODE(Op, trunc_normal),
                         FI_CODE(Op, sparse_mask),  FI_CODE(Op, trunc_erfinv)};

// How the running torch evaluates the float32 Box-Muller of its groups of 16, and whether its
// compiler contracted multiply and add. Found by the probes in fastinit/probe.py.
enum Flavour : uint8_t {
  kContracted = 1,  // a * b + c is one rounding (torch's AVX2 and AVX-512 kernels)
  kCephes = 2,      // log, sin, cos are the cephes polynomials; otherwise libm's functions
  kKeepsEnd = 4,    // uniform: what rounds up to `to` stays (torch 2.11), else becomes `from`
};

// A strided destination, innermost dimension first, strides in elements. rank 0: dense memory.
struct Strided {
  int64_t size[4];
  int64_t stride[4];
};
FI_LAYOUT(Strided, FI_FIELD(size), FI_FIELD(stride));

// Ones in an otherwise zero tensor of rows of `row_length` elements: row r has its one at column
// (r mod group_rows) * channel + centre, if (r mod group_rows) < channels.
struct Diagonal {
  int64_t row_length, group_rows, channels, channel, centre, unused[3];
};
FI_LAYOUT(Diagonal, FI_FIELD(row_length), FI_FIELD(group_rows), FI_FIELD(channels),
          FI_FIELD(channel), FI_FIELD(centre), FI_UNUSED(unused));

struct Sparse {
  int64_t rows, zeros, row_stride, unused[5];  // zeros per column; columns are adjacent in memory
};
FI_LAYOUT(Sparse, FI_FIELD(rows), FI_FIELD(zeros), FI_FIELD(row_stride), FI_UNUSED(unused));

struct FillDesc {
  uint64_t address;     // of element 0; owned by the plan, which keeps the tensor alive
  uint64_t items;       // elements, or columns for sparse_mask
  double a, b;          // parameters of the law
  double lo, hi;        // bounds of trunc_normal, already rounded to the dtype
  uint64_t first_word;  // counted from the position the source had when the plan started
  int32_t source;       // index into the plan's sources; -1: none
  Op op;
  Dtype dtype;
  uint8_t flavour;  // of enum Flavour
  uint8_t rank;     // of `strided`; 0: dense
  union {
    Strided strided;
    Diagonal diagonal;
    Sparse sparse;
  };
};
FI_LAYOUT(FillDesc, FI_FIELD(address), FI_FIELD(items), FI_FIELD(a), FI_FIELD(b), FI_FIELD(lo),
          FI_FIELD(hi), FI_FIELD(first_word), FI_FIELD(source), FI_FIELD(op), FI_FIELD(dtype),
          FI_FIELD(flavour), FI_FIELD(rank), FI_FIELD(strided));

// The state of torch's CPU generator as Generator.get_state() lays it out (5,056 bytes).
struct TorchState {
  uint64_t seed;
  int32_t left, seeded;                   // left counts down from 624; 1: the next draw refills
  uint64_t next;                          // index of the next word in `words`
  uint64_t words[624];                    // each holds 32 bits, not yet tempered
  double normal_x, normal_y, normal_rho;  // normal_y: the cached second sample
  int32_t normal_is_valid, pad;
  float next_float_normal;
  int32_t next_float_is_valid;
};
static_assert(sizeof(TorchState) == 5056, "torch.Generator.get_state() has 5,056 bytes");

inline int element_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

}  // namespace fastinit
