// SPDX-License-Identifier: BSD-3-Clause
// The words of target.h, lanes.h and qr/block.h for the host's compiler, with which the tests
// compile the bodies of the kernels. Sine and cosine, erfinv, the square root and float64's
// logarithm come from elsewhere than on a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "target.h"

namespace fastinit {
namespace cuda {

inline float mul(float a, float b) { return a * b; }
inline double mul(double a, double b) { return a * b; }
inline float plus(float a, float b) { return a + b; }
inline double plus(double a, double b) { return a + b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
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

inline uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
inline float view(uint32_t x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}
inline float value_bf16(uint16_t x) { return view(static_cast<uint32_t>(x) << 16); }
inline uint16_t code_bf16(float x) {
  const uint32_t u = bits(x);
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
  const uint16_t sign = static_cast<uint16_t>(bits(x) >> 16 & 0x8000);
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
inline uint64_t bits64(double v) {
  uint64_t u;
  memcpy(&u, &v, sizeof u);
  return u;
}
inline double view64(uint64_t u) {
  double v;
  memcpy(&v, &u, sizeof v);
  return v;
}

// ---- qr/block.h ---------------------------------------------------------------------------------

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

// ---- lanes.h ------------------------------------------------------------------------------------

namespace keyed {

inline float root(float v) { return std::sqrt(v); }
inline float quotient(float a, float b) { return a / b; }
inline uint32_t pair_bf16(float x, float y) {
  return static_cast<uint32_t>(code_bf16(y)) << 16 | code_bf16(x);
}
inline uint32_t pair_f16(float x, float y) {
  return static_cast<uint32_t>(code_f16(y)) << 16 | code_f16(x);
}

}  // namespace keyed
}  // namespace cuda
}  // namespace fastinit
