// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary at width 1: the fallback target, and the specification of the others.
// lanes_avx2.h and lanes_avx512.h define the same names in the same order; read them side by side.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../target.h"

namespace fastinit {
namespace scalar {
namespace {

constexpr int kLanes = 1;
constexpr int kPairs = 8;  // Box-Muller pairs per step; a step is 2 * kPairs words or elements
using F = float;           // kLanes floats
using U = uint32_t;        // kLanes words; + is not defined on them, & | ^ are

// Memory, constants, views.
FI_INLINE U load(const uint32_t* p) { return *p; }
FI_INLINE void store(uint32_t* p, U v) { *p = v; }
FI_INLINE U words(uint32_t v) { return v; }
FI_INLINE F floats(float v) { return v; }
FI_INLINE U bits(F v) {
  U u;
  memcpy(&u, &v, 4);
  return u;
}
FI_INLINE F view(U u) {
  F v;
  memcpy(&v, &u, 4);
  return v;
}

// Integers.
template <int n>
FI_INLINE U shl(U v) {
  return v << n;
}
template <int n>
FI_INLINE U shr(U v) {
  return v >> n;
}
template <int n>
FI_INLINE U window(U, U, const uint32_t* p) {  // load(p): lanes n, n + 1, ... of a followed by b
  return load(p);
}
template <int n>
FI_INLINE U sra(U v) {  // copies the sign bit
  return static_cast<U>(static_cast<int32_t>(v) >> n);
}
FI_INLINE U add(U a, U b) { return a + b; }
FI_INLINE U sub(U a, U b) { return a - b; }
FI_INLINE F to_float(U v) { return static_cast<float>(static_cast<int32_t>(v)); }

// Floats; F has + - * besides. One rounding each.
FI_INLINE F fma(F a, F b, F c) { return std::fma(a, b, c); }    //  a * b + c
FI_INLINE F fms(F a, F b, F c) { return std::fma(a, b, -c); }   //  a * b - c
FI_INLINE F fnma(F a, F b, F c) { return std::fma(-a, b, c); }  // -a * b + c
FI_INLINE F root(F v) { return std::sqrt(v); }

// Choices.
FI_INLINE F if_equal(F x, F y, F yes, F no) { return x == y ? yes : no; }
FI_INLINE F if_clear(U x, U mask, F yes, F no) { return (x & mask) == 0 ? yes : no; }
FI_INLINE U if_odd(U x, U yes) { return (0 - (x & 1)) & yes; }                  // otherwise 0
FI_INLINE uint32_t lanes_outside(F v, F lo, F hi) { return v < lo || v > hi; }  // one bit per lane

// The nearest value, ties to even, that the 16-bit types have.
FI_INLINE F code_bf16(F v) {  // the upper 16 bits; the lower ones are rubbish
  const U u = bits(v);
  return view(u + 0x7fff + ((u >> 16) & 1));
}
FI_INLINE uint16_t code_f16(F v) {  // IEEE binary16
  const U u = bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  U code = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  if (magnitude >= 0x47800000) code = 0x7c00;  // 65536 and above: infinity
  if (magnitude < 0x38800000) {                // below 2^-14: a multiple of 2^-24
    code = static_cast<U>(std::nearbyint(view(magnitude) * 16777216.0f));
  }
  return static_cast<uint16_t>(sign | code);
}
FI_INLINE F round_f16(F v) {
  const U code = code_f16(v), sign = (code & 0x8000) << 16, magnitude = code & 0x7fff;
  if (magnitude < 0x0400) return view(sign | bits(to_float(magnitude) * 5.9604644775390625e-8f));
  return view(sign | ((magnitude << 13) + (magnitude == 0x7c00 ? 0x70000000 : 0x38000000)));
}

// Results: a vector, or two that belong kPairs elements apart (code_bf16 first; f16 is rounded
// here). kStream: past the caches, for p aligned to 64 bytes.
template <bool kStream>
FI_INLINE void put(void* p, U v) {
  memcpy(p, &v, 4);
}
template <bool kStream>
FI_INLINE void put_f32(float* p, F low, F high) {
  p[0] = low;
  p[kPairs] = high;
}
template <bool kStream>
FI_INLINE void put_bf16(uint16_t* p, F low, F high) {
  p[0] = static_cast<uint16_t>(bits(low) >> 16);
  p[kPairs] = static_cast<uint16_t>(bits(high) >> 16);
}
template <bool kStream>
FI_INLINE void put_f16(uint16_t* p, F low, F high) {
  p[0] = code_f16(low);
  p[kPairs] = code_f16(high);
}
// The lanes whose bits are set, at the front; whether that is an instruction.
constexpr bool kSqueezes = false;
FI_INLINE U squeezed(U v, uint32_t) { return v; }
// Those of up to 32 values whose bits are set.
template <class T>
FI_INLINE void put_where(T* p, const T* values, uint32_t which) {
  for (; which != 0; which &= which - 1) p[__builtin_ctz(which)] = values[__builtin_ctz(which)];
}
FI_INLINE void fence() {}

// One step of pairs: torch's groups of 16 words hold 8 first and 8 second members.
// load: from 2 * kPairs words at p, pair j; join: back to memory order.
FI_INLINE void load_pairs(const uint32_t* p, U& first, U& second) {
  first = p[0];
  second = p[8];
}
FI_INLINE void join_pairs(F&, F&) {}

// The keyed stream. A step is kBlocks blocks of Philox, one in each 64-bit lane of a W, of which
// only the lower half counts; the words of kParts vectors of each are taken together.
constexpr int kBlocks = 1;
constexpr int kParts = 2;
using W = uint64_t;
FI_INLINE W count_from(uint64_t block) { return block; }   // in the order that `zip` restores
FI_INLINE W load_blocks(const uint64_t* p) { return *p; }  // likewise
FI_INLINE W all(uint64_t v) { return v; }
FI_INLINE W product(W v, uint32_t by) { return uint64_t{static_cast<uint32_t>(v)} * by; }
FI_INLINE W upper(W v) { return v >> 32; }
FI_INLINE W mix(W a, W b, uint32_t key) { return a ^ b ^ key; }
FI_INLINE void pair(W a, W b, U* out) {  // words of a and b in turn
  out[0] = static_cast<U>(a);
  out[1] = static_cast<U>(b);
}
FI_INLINE void zip(F x, F y, F& low, F& high) {  // what `pair`ed words became, in their order
  low = x;
  high = y;
}
FI_INLINE F mul(F a, F b) { return a * b; }
FI_INLINE F plus(F a, F b) { return a + b; }
FI_INLINE F minus(F a, F b) { return a - b; }
FI_INLINE F flip(F v, U by) {
  return view(bits(v) ^ (by & 0x80000000));
}  // its sign, if by's is set
using M = bool;  // for each lane
template <int n>
FI_INLINE M bit(U v) {
  return (v >> n & 1) != 0;
}
FI_INLINE F either(M m, F yes, F no) { return m ? yes : no; }
FI_INLINE F plus_if(M m, F a, F b) { return m ? a + b : b; }
FI_INLINE F quotient(F a, F b) { return a / b; }
FI_INLINE F smaller(F a, F b) { return a < b ? a : b; }
FI_INLINE F larger(F a, F b) { return a > b ? a : b; }
FI_INLINE F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }

// Vectors of float or double for products; + - * / of the compiler's vector extension besides.
template <class T>
using Wide = typename WideOf<T, 16>::type;
constexpr int kTileRows = 4;  // rows of a tile of two vectors that the registers hold
FI_INLINE Wide<float> wide(float v) { return Wide<float>{v, v, v, v}; }
FI_INLINE Wide<double> wide(double v) { return Wide<double>{v, v}; }
template <class T>
FI_INLINE T mad(T a, T b, T c) {  // a * b + c; the other targets in one rounding
  return a * b + c;
}
template <class T>
FI_INLINE T nmad(T a, T b, T c) {  // c - a * b, likewise
  return c - a * b;
}

}  // namespace
}  // namespace scalar
}  // namespace fastinit
