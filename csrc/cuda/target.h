// SPDX-License-Identifier: BSD-3-Clause
// What the bodies of the kernel are written in. nvcc compiles them for GPUs; the tests compile them
// with the host's compiler, where sine and cosine, erfinv, the square root and float64's logarithm
// come from elsewhere.
#pragma once

#include <cstdint>

#include "../fill_desc.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FI_FN __device__ __forceinline__
#else
#define FI_FN inline
#endif
#define FI_LAW FI_FN

namespace fastinit {
namespace cuda {

struct alignas(16) Pack {  // one store
  uint32_t x[4];
};

#if defined(__CUDACC__)

// `a * b` alone is never merged with an addition; where torch's compiler did so, the law says fma.
FI_FN float mul(float a, float b) { return __fmul_rn(a, b); }
FI_FN double mul(double a, double b) { return __dmul_rn(a, b); }
FI_FN float plus(float a, float b) { return __fadd_rn(a, b); }
FI_FN double plus(double a, double b) { return __dadd_rn(a, b); }
FI_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FI_FN double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
FI_FN double log_of(double x) { return log(x); }
// What nvcc makes of an IEEE square root, without the way out for arguments below 2^-100.
FI_FN float sqrt_of(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, 1e-30f)));
  const float root = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(y, 0.5f), root);
}
FI_FN double sqrt_of(double x) { return __dsqrt_rn(x); }
FI_FN float erfinv_of(float x) { return erfinvf(x); }
FI_FN double erfinv_of(double x) { return erfinv(x); }
FI_FN void sincos_fast(float x, float* s, float* c) { __sincosf(x, s, c); }
FI_FN void sincospi_of(double x, double* s, double* c) { sincospi(x, s, c); }
// As one instruction: from `uint64_t{a} * b` nvcc 13.0 makes two, a fifth of a uniform.
FI_FN uint64_t mul_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}
FI_FN float to_float(uint32_t x) { return __uint2float_rn(x); }
FI_FN float to_float(int32_t x) { return __int2float_rn(x); }
FI_FN double to_double(uint64_t x) { return __ull2double_rn(x); }

FI_FN uint16_t code_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FI_FN uint16_t code_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
FI_FN float value_bf16(uint16_t x) { return __bfloat162float(__ushort_as_bfloat16(x)); }
FI_FN float value_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
FI_FN uint32_t bits(float x) { return __float_as_uint(x); }
FI_FN float view(uint32_t u) { return __uint_as_float(u); }
FI_FN uint64_t bits64(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
FI_FN double view64(uint64_t u) { return __longlong_as_double(static_cast<long long>(u)); }

// Addresses come as numbers, so the compiler does not see that they are of global memory.
FI_FN void store(uint64_t to, const Pack& pack) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(pack.x[0]), "r"(pack.x[1]), "r"(pack.x[2]), "r"(pack.x[3])
               : "memory");
}
FI_FN void store(uint64_t to, double x) {
  asm volatile("st.global.f64 [%0], %1;" : : "l"(to), "d"(x) : "memory");
}
FI_FN void store(uint64_t to, float x) {
  asm volatile("st.global.f32 [%0], %1;" : : "l"(to), "f"(x) : "memory");
}
FI_FN void store(uint64_t to, uint16_t x) {
  asm volatile("st.global.b16 [%0], %1;" : : "l"(to), "h"(x) : "memory");
}
#endif

}  // namespace cuda
}  // namespace fastinit

#if !defined(__CUDACC__)
#include "host.h"
#endif

namespace fastinit {
namespace cuda {
#include "../dtypes.inl.h"

// How a dtype is stored (T) and computed with (A).
template <class X>
struct Same {
  using T = X;
  using A = X;
  static FI_FN T code(A x) { return x; }
  static FI_FN A value(T x) { return x; }
};

template <uint16_t (*encode)(float), float (*decode)(uint16_t)>
struct Coded {
  using T = uint16_t;
  using A = float;
  static FI_FN T code(A x) { return encode(x); }
  static FI_FN A value(T x) { return decode(x); }
};

template <Dtype dtype>
struct Element;
template <>
struct Element<Dtype::f32> : Same<float> {};
template <>
struct Element<Dtype::f64> : Same<double> {};
template <>
struct Element<Dtype::bf16> : Coded<code_bf16, value_bf16> {};
template <>
struct Element<Dtype::f16> : Coded<code_f16, value_f16> {};

}  // namespace cuda
}  // namespace fastinit
