// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of lanes_scalar.h on 8 lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../target.h"

namespace fastinit {
namespace avx2 {
FI_BEGIN_TARGET("avx2,fma,f16c")
namespace {

constexpr int kLanes = 8;
constexpr int kPairs = 8;
using F = __m256;
using U = __m256i;

// Memory, constants, views.
FI_INLINE U load(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FI_INLINE void store(uint32_t* p, U v) { _mm256_storeu_si256((__m256i*)p, v); }
FI_INLINE U words(uint32_t v) { return _mm256_set1_epi32((int)v); }
FI_INLINE F floats(float v) { return _mm256_set1_ps(v); }
FI_INLINE U bits(F v) { return _mm256_castps_si256(v); }
FI_INLINE F view(U v) { return _mm256_castsi256_ps(v); }

// Integers.
template <int n>
FI_INLINE U shl(U v) {
  return _mm256_slli_epi32(v, n);
}
template <int n>
FI_INLINE U shr(U v) {
  return _mm256_srli_epi32(v, n);
}
template <int n>
FI_INLINE U window(U, U, const uint32_t* p) {
  return load(p);
}
template <int n>
FI_INLINE U sra(U v) {
  return _mm256_srai_epi32(v, n);
}
FI_INLINE U add(U a, U b) { return _mm256_add_epi32(a, b); }
FI_INLINE U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
FI_INLINE F to_float(U v) { return _mm256_cvtepi32_ps(v); }

// Floats.
FI_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FI_INLINE F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
FI_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
FI_INLINE F root(F v) { return _mm256_sqrt_ps(v); }

// Choices.
FI_INLINE F if_equal(F x, F y, F yes, F no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, y, _CMP_EQ_OQ));
}
FI_INLINE F if_clear(U x, U mask, F yes, F no) {
  return _mm256_blendv_ps(no, yes, view(_mm256_cmpeq_epi32(x & mask, _mm256_setzero_si256())));
}
FI_INLINE U if_odd(U x, U yes) { return sub(words(0), x & words(1)) & yes; }
FI_INLINE uint32_t lanes_outside(F v, F lo, F hi) {
  return (uint32_t)_mm256_movemask_ps(
      _mm256_or_ps(_mm256_cmp_ps(v, lo, _CMP_LT_OQ), _mm256_cmp_ps(v, hi, _CMP_GT_OQ)));
}

// The nearest value of the 16-bit types.
FI_INLINE F code_bf16(F v) {
  const U u = bits(v);
  return view(add(add(u, words(0x7fff)), shr<16>(u) & words(1)));
}
FI_INLINE F round_f16(F v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }

// Results.
template <bool kStream>
FI_INLINE void put(void* p, U v) {
  if (kStream) {
    _mm256_stream_si256((__m256i*)p, v);
  } else {
    _mm256_storeu_si256((__m256i*)p, v);
  }
}
template <bool kStream>
FI_INLINE void put_f32(float* p, F low, F high) {
  put<kStream>(p, bits(low));
  put<kStream>(p + kLanes, bits(high));
}
template <bool kStream>
FI_INLINE void put_bf16(uint16_t* p, F low, F high) {
  const U halves = _mm256_packus_epi32(shr<16>(bits(low)), shr<16>(bits(high)));
  put<kStream>(p, _mm256_permute4x64_epi64(halves, 0xd8));
}
template <bool kStream>
FI_INLINE void put_f16(uint16_t* p, F low, F high) {
  put<kStream>(p, _mm256_set_m128i(_mm256_cvtps_ph(high, 0), _mm256_cvtps_ph(low, 0)));
}
// The lanes whose bits are set, at the front; whether that is an instruction.
constexpr bool kSqueezes = false;
FI_INLINE U squeezed(U v, uint32_t which) {
  uint32_t from[kLanes], to[kLanes] = {};
  store(from, v);
  for (uint32_t* p = to; which != 0; which &= which - 1) *p++ = from[__builtin_ctz(which)];
  return load(to);
}
// Those of up to 32 values whose bits are set.
template <class T>
FI_INLINE void put_where(T* p, const T* values, uint32_t which) {
  for (; which != 0; which &= which - 1) p[__builtin_ctz(which)] = values[__builtin_ctz(which)];
}
FI_INLINE void fence() { _mm_sfence(); }

// One step of pairs.
FI_INLINE void load_pairs(const uint32_t* p, U& first, U& second) {
  first = load(p);
  second = load(p + 8);
}
FI_INLINE void join_pairs(F&, F&) {}

// The keyed stream.
constexpr int kBlocks = 4;
constexpr int kParts = 1;
using W = __m256i;
FI_INLINE W count_from(uint64_t block) {
  return _mm256_add_epi64(_mm256_set1_epi64x((long long)block), _mm256_set_epi64x(3, 1, 2, 0));
}
FI_INLINE W load_blocks(const uint64_t* p) {
  return _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)p), 0xd8);
}
FI_INLINE W all(uint64_t v) { return _mm256_set1_epi64x((long long)v); }
FI_INLINE W product(W v, uint32_t by) {
  return _mm256_mul_epu32(v, _mm256_set1_epi64x((long long)by));
}
FI_INLINE W upper(W v) { return _mm256_srli_epi64(v, 32); }
FI_INLINE W mix(W a, W b, uint32_t key) { return a ^ b ^ words(key); }
FI_INLINE void pair(W a, W b, U* out) {
  *out = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
}
FI_INLINE void zip(F x, F y, F& low, F& high) {
  low = _mm256_unpacklo_ps(x, y);
  high = _mm256_unpackhi_ps(x, y);
}
FI_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FI_INLINE F plus(F a, F b) { return _mm256_add_ps(a, b); }
FI_INLINE F minus(F a, F b) { return _mm256_sub_ps(a, b); }
FI_INLINE F flip(F v, U by) { return view(bits(v) ^ (by & words(0x80000000))); }
using M = F;  // by the sign
template <int n>
FI_INLINE M bit(U v) {
  return view(shl<31 - n>(v));
}
FI_INLINE F either(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
FI_INLINE F plus_if(M m, F a, F b) { return either(m, plus(a, b), b); }
FI_INLINE F quotient(F a, F b) { return _mm256_div_ps(a, b); }
FI_INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
FI_INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
FI_INLINE F if_less(F a, F b, F yes, F no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

// Vectors for products.
template <class T>
using Wide = typename WideOf<T, 32>::type;
constexpr int kTileRows = 4;
FI_INLINE Wide<float> wide(float v) { return _mm256_set1_ps(v); }
FI_INLINE Wide<double> wide(double v) { return _mm256_set1_pd(v); }
FI_INLINE F mad(F a, F b, F c) { return fma(a, b, c); }
FI_INLINE __m256d mad(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
FI_INLINE F nmad(F a, F b, F c) { return fnma(a, b, c); }
FI_INLINE __m256d nmad(__m256d a, __m256d b, __m256d c) { return _mm256_fnmadd_pd(a, b, c); }

}  // namespace
FI_END_TARGET
}  // namespace avx2
}  // namespace fastinit
