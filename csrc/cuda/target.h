// SPDX-License-Identifier: BSD-3-Clause
// What the bodies of the kernel are written in. nvcc compiles them for GPUs; the tests compile them
// with the host's compiler, where sine and cosine, erfinv, the square root and float64's logarithm
// come from elsewhere.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FI_FN __device__ __forceinline__
#else
#include <cmath>
#include <cstring>
#define FI_FN inline
#endif

namespace fastinit {
namespace cuda {

struct alignas(16) Pack {  // one store
  uint32_t x[4];
};

#if defined(__CUDACC__)

// `a * b` alone is never merged with an addition; where torch's compiler did so, the law says fma.
FI_FN float mul(float a, float b) { return __fmul_rn(a, b); }
FI_FN double mul(double a, double b) { return __dmul_rn(a, b); }
FI_FN float add(float a, float b) { return __fadd_rn(a, b); }
FI_FN double add(double a, double b) { return __dadd_rn(a, b); }
FI_FN float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FI_FN double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }
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
FI_FN uint32_t bits_of(float x) { return __float_as_uint(x); }

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
FI_FN float float_of(uint32_t x) { return __uint_as_float(x); }

#else

inline float mul(float a, float b) { return a * b; }
inline double mul(double a, double b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline double add(double a, double b) { return a + b; }
inline float fma_of(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_of(double a, double b, double c) { return std::fma(a, b, c); }
inline double log_of(double x) { return std::log(x); }
inline float sqrt_of(float x) { return std::sqrt(x); }
inline double sqrt_of(double x) { return std::sqrt(x); }
inline void sincos_fast(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline void sincospi_of(double x, double* s, double* c) {
  *s = std::sin(M_PI * x), *c = std::cos(M_PI * x);
}
inline double erfinv_of(double x) {  // Newton's method on erfc, from Winitzki's approximation
  const double rest = 1 - std::fabs(x);
  if (rest <= 0) return x * INFINITY;
  const double w = std::log(rest * (2 - rest)), t = 2 / (M_PI * 0.147) + w / 2;
  double y = std::sqrt(std::sqrt(t * t - w / 0.147) - t);
  for (int i = 0; i < 4; ++i) y += (std::erfc(y) - rest) * std::sqrt(M_PI) / 2 * std::exp(y * y);
  return std::copysign(y, x);
}
inline float erfinv_of(float x) { return static_cast<float>(erfinv_of(static_cast<double>(x))); }
inline uint64_t mul_wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }
inline float to_float(uint32_t x) { return static_cast<float>(x); }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline double to_double(uint64_t x) { return static_cast<double>(x); }

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}
inline float value_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
inline uint16_t code_bf16(float x) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float value_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                          : exponent == 31
                              ? INFINITY
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x >> 15 ? -magnitude : magnitude;
}
inline uint16_t code_f16(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);                         // magnitude = 0.1... * 2^exponent
  const int unit = (exponent < -13 ? -13 : exponent) - 11;  // of the last place
  const int places = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  const int code = exponent < -13 ? places : (unit + 24) * 1024 + places;
  return sign | static_cast<uint16_t>(code);
}
void written(uint64_t address, uint64_t bytes);  // the tests count stores

template <class T>
void store(uint64_t to, const T& x) {
  written(to, sizeof x);
  memcpy(reinterpret_cast<void*>(to), &x, sizeof x);
}

#endif

}  // namespace cuda
}  // namespace fastinit
