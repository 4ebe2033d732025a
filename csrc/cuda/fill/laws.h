// SPDX-License-Identifier: BSD-3-Clause
// torch's laws on CUDA: from the words of a Philox block to elements of a tensor, rounding by
// rounding as in ATen/native/cuda/DistributionTemplates.h and the cuRAND functions it calls.
#pragma once

#include "launch.h"
#include "philox.h"

namespace fastinit {
namespace cuda {

// Elements that share a Philox block.
template <class T>
constexpr int kPerBlock = sizeof(T) == 8 ? 2 : 4;

// (0, 1] from one word; curand_uniform.
FI_FN float unit(uint32_t w) { return fma(to_float(w), 0x1p-32f, 0x1p-33f); }

// 53 bits of two words, which overlap; curand_uniform_double.
FI_FN double bits53(uint32_t a, uint32_t b) { return to_double(a ^ uint64_t{b} << 21); }
FI_FN double unit(uint32_t a, uint32_t b) { return fma(bits53(a, b), 0x1p-53, 0x1p-54); }

// Element `i` of the uniforms of a block.
FI_FN void uniform_of(const PhiloxWords& x, int i, float* u) { *u = unit(x.w[i]); }
FI_FN void uniform_of(const PhiloxWords& x, int i, double* u) {
  *u = unit(x.w[2 * i], x.w[2 * i + 1]);
}

// logf of CUDA's libdevice, operation by operation, for what `unit` gives: its branches for
// denormal and infinite arguments are left out, and 2^-23 is part of the constant that the exponent
// meets.
FI_FN float log_of(float x) {
  const uint32_t exponent = (bits(x) - 0x3F2AAAABu) & 0xFF800000u;
  const float f = plus(view(bits(x) - exponent), -1.0f);
  float p = fma(f, view(0xBE055027), view(0x3E1039F6));
  p = fma(f, p, view(0xBDF8CDCC));
  p = fma(f, p, view(0x3E0F2955));
  p = fma(f, p, view(0xBE2AD8B9));
  p = fma(f, p, view(0x3E4CED0B));
  p = fma(f, p, view(0xBE7FFF22));
  p = fma(f, p, view(0x3EAAAA78));
  p = fma(f, p, -0.5f);
  p = fma(f, mul(f, p), f);
  return fma(to_float(static_cast<int32_t>(exponent)), 0x1p-23f * view(0x3F317218), p);
}

// Two standard normals, sine first; curand_box_muller, whose sine and cosine are the hardware's.
FI_FN void box_muller(uint32_t a, uint32_t b, float* z) {
  constexpr float kTurn = 0x1p-32f * 6.2831855f;
  const float s = sqrt_of(mul(-2.0f, log_of(unit(a))));
  float sine, cosine;
  sincos_fast(fma(to_float(b), kTurn, kTurn / 2), &sine, &cosine);
  z[0] = mul(sine, s);
  z[1] = mul(cosine, s);
}

FI_FN void box_muller(const PhiloxWords& x, double* z) {
  const double s = sqrt_of(mul(-2.0, log_of(unit(x.w[0], x.w[1]))));
  double sine, cosine;
  sincospi_of(fma(bits53(x.w[2], x.w[3]), 0x1p-52, 0x1p-53), &sine, &cosine);
  z[0] = mul(sine, s);
  z[1] = mul(cosine, s);
}

// The first `count` of the normals of a block.
template <int count>
FI_FN void normals_of(const PhiloxWords& x, float* z) {
  float pair[2];
  box_muller(x.w[0], x.w[1], pair);
  z[0] = pair[0];
  if (count > 1) z[1] = pair[1];
  if (count > 2) {
    box_muller(x.w[2], x.w[3], pair);
    z[2] = pair[0];
    z[3] = pair[1];
  }
}

template <int count>
FI_FN void normals_of(const PhiloxWords& x, double* z) {
  double pair[2];
  box_muller(x, pair);
  z[0] = pair[0];
  if (count > 1) z[1] = pair[1];
}

// uniform_kernel: what rounds up to `to` becomes `from`.
template <Dtype dtype>
struct Uniform {
  using E = Element<dtype>;
  using A = typename E::A;
  A from, to, range;

  explicit FI_FN Uniform(const double* p)
      : from(E::value(E::code(static_cast<A>(p[0])))),
        to(E::value(E::code(static_cast<A>(p[1])))),
        range(E::value(E::code(plus(to, -from)))) {}
  FI_FN typename E::T value(A u) const {
    const typename E::T v = E::code(fma(u, range, from));
    return E::value(v) == to ? E::code(from) : v;
  }
  template <int count>
  FI_FN void draw(const PhiloxWords& x, typename E::T* out) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      A u;
      uniform_of(x, i, &u);
      out[i] = value(u);
    }
  }
};

template <Dtype dtype>
struct Normal {
  using E = Element<dtype>;
  using A = typename E::A;
  A mean, std;

  explicit FI_FN Normal(const double* p) : mean(static_cast<A>(p[0])), std(static_cast<A>(p[1])) {}
  template <int count>
  FI_FN void draw(const PhiloxWords& x, typename E::T* out) const {
    A z[kPerBlock<typename E::T>];
    normals_of<count>(x, z);
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = E::code(fma(z[i], std, mean));
  }
};

// trunc_normal_ before torch 2.12: uniform_, erfinv_, mul_, add_, clamp_, each rounded to the
// dtype.
template <Dtype dtype>
struct TruncErfinv {
  using E = Element<dtype>;
  using A = typename E::A;
  Uniform<dtype> uniform;
  A scale, mean, lo, hi;

  explicit FI_FN TruncErfinv(const double* p)
      : uniform(p),
        scale(static_cast<A>(p[2])),
        mean(static_cast<A>(p[3])),
        lo(static_cast<A>(p[4])),
        hi(static_cast<A>(p[5])) {}
  template <int count>
  FI_FN void draw(const PhiloxWords& x, typename E::T* out) const {
    uniform.template draw<count>(x, out);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      A v = E::value(E::code(erfinv_of(E::value(out[i]))));
      v = E::value(E::code(mul(v, scale)));
      v = E::value(E::code(plus(v, mean)));
      v = v < lo ? lo : v;
      out[i] = E::code(v > hi ? hi : v);
    }
  }
};

}  // namespace cuda
}  // namespace fastinit
