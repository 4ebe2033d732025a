// SPDX-License-Identifier: BSD-3-Clause
// The vocabulary of ../laws.inl.h for one thread of a GPU, and for the tests on the host: what
// cpu/lanes_scalar.h says, in operations of one fixed rounding.
#pragma once

#include <cstdint>

#include "target.h"

namespace fastinit {
namespace cuda {
namespace keyed {

using F = float;
using U = uint32_t;
using W = uint64_t;  // of which the upper half mostly does not count, and costs nothing

FI_FN U words(uint32_t v) { return v; }
FI_FN F floats(float v) { return v; }

template <int n>
FI_FN U shl(U v) {
  return v << n;
}
FI_FN U add(U a, U b) { return a + b; }
FI_FN U sub(U a, U b) { return a - b; }
FI_FN F to_float(U v) { return cuda::to_float(static_cast<int32_t>(v)); }

FI_FN W all(uint64_t v) { return v; }
FI_FN W product(W v, uint32_t by) { return mul_wide(static_cast<uint32_t>(v), by); }
FI_FN W upper(W v) { return v >> 32; }
FI_FN W mix(W a, W b, uint32_t key) {
  return static_cast<uint32_t>(a) ^ static_cast<uint32_t>(b) ^ key;
}

FI_FN F minus(F a, F b) { return plus(a, -b); }
FI_FN F flip(F v, U by) { return view(bits(v) ^ (by & 0x80000000)); }  // its sign, if by's is set
using M = U;  // not 0: nvcc 13.0 makes fewer instructions of it than of bool
template <int n>
FI_FN M bit(U v) {
  return v & 1u << n;
}
FI_FN F either(M m, F yes, F no) { return m == 0 ? no : yes; }
FI_FN F plus_if(M m, F a, F b) { return m == 0 ? b : plus(a, b); }
FI_FN F fnma(F a, F b, F c) { return fma(-a, b, c); }  // -a * b + c
FI_FN double root(double v) { return sqrt_of(v); }
FI_FN double to_double_signed(int64_t v) { return static_cast<double>(v); }
FI_FN double to_double(uint64_t v) { return to_double_signed(static_cast<int64_t>(v)); }

// Not the hardware's minimum and maximum, which tell zeros by their signs.
FI_FN F smaller(F a, F b) { return a < b ? a : b; }
FI_FN F larger(F a, F b) { return a > b ? a : b; }
FI_FN F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }

#if defined(__CUDACC__)

// What nvcc makes of an IEEE square root and quotient, without their ways out for arguments near
// the ends of the range: roots are of 1e-10 to 100, and quotients of 0 or 1e-9 to 1e4 by 1 to 1e4.
FI_FN F root(F v) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  const float near = __fmul_rn(v, y);
  return __fmaf_rn(__fmaf_rn(-near, near, v), __fmul_rn(y, 0.5f), near);
}
FI_FN F quotient(F a, F b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  const float near = __fmul_rn(a, y);
  return __fmaf_rn(y, __fmaf_rn(-b, near, a), near);
}
// Two elements of 16 bits, the first one below: one instruction.
FI_FN uint32_t pair_bf16(F x, F y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}
FI_FN uint32_t pair_f16(F x, F y) {
  const __half2 both = __floats2half2_rn(x, y);
  return static_cast<uint32_t>(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
}

#endif

#include "../laws.inl.h"

}  // namespace keyed
}  // namespace cuda
}  // namespace fastinit
