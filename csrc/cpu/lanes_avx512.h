// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of lanes_scalar.h on 16 lanes: AVX-512 F and DQ (with AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../target.h"

namespace fastinit {
namespace avx512 {
FI_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
namespace {

constexpr int kLanes = 16;
constexpr int kPairs = 16;
using F = __m512;
using U = __m512i;

// Memory, constants, views.
FI_INLINE U load(const uint32_t* p) { return _mm512_loadu_si512(p); }
FI_INLINE void store(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }
FI_INLINE U words(uint32_t v) { return _mm512_set1_epi32((int)v); }
FI_INLINE F floats(float v) { return _mm512_set1_ps(v); }
FI_INLINE U bits(F v) { return _mm512_castps_si512(v); }
FI_INLINE F view(U v) { return _mm512_castsi512_ps(v); }

// Integers.
template <int n>
FI_INLINE U shl(U v) {
  return _mm512_slli_epi32(v, n);
}
template <int n>
FI_INLINE U shr(U v) {
  return _mm512_srli_epi32(v, n);
}
template <int n>
FI_INLINE U window(U a, U b, const uint32_t*) {  // an unaligned load would cross a cache line
  return _mm512_alignr_epi32(b, a, n);
}
template <int n>
FI_INLINE U sra(U v) {
  return _mm512_srai_epi32(v, n);
}
FI_INLINE U add(U a, U b) { return _mm512_add_epi32(a, b); }
FI_INLINE U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
FI_INLINE F to_float(U v) { return _mm512_cvtepi32_ps(v); }

// Floats.
FI_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FI_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
FI_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
FI_INLINE F root(F v) { return _mm512_sqrt_ps(v); }

// Choices.
FI_INLINE F if_equal(F x, F y, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), no, yes);
}
FI_INLINE F if_clear(U x, U mask, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_testn_epi32_mask(x, mask), no, yes);
}
FI_INLINE U if_odd(U x, U yes) {
  return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(x, words(1)), yes);
}
FI_INLINE uint32_t lanes_outside(F v, F lo, F hi) {
  return (uint32_t)(_mm512_cmp_ps_mask(v, lo, _CMP_LT_OQ) | _mm512_cmp_ps_mask(v, hi, _CMP_GT_OQ));
}

// The nearest value of the 16-bit types.
FI_INLINE F code_bf16(F v) {
  const U u = bits(v), down = add(u, words(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(u, words(0x10000));
  return view(_mm512_mask_add_epi32(down, odd, down, words(1)));
}
FI_INLINE F round_f16(F v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }

// Results.
template <bool kStream>
FI_INLINE void put(void* p, U v) {
  if (kStream) {
    _mm512_stream_si512((__m512i*)p, v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}
template <bool kStream>
FI_INLINE void put_f32(float* p, F low, F high) {
  put<kStream>(p, bits(low));
  put<kStream>(p + kLanes, bits(high));
}
template <bool kStream>
FI_INLINE void put_bf16(uint16_t* p, F low, F high) {
  const U odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  put<kStream>(p, _mm512_permutex2var_epi16(bits(low), odd, bits(high)));
}
template <bool kStream>
FI_INLINE void put_f16(uint16_t* p, F low, F high) {
  const U l = _mm512_castsi256_si512(_mm512_cvtps_ph(low, 0));
  put<kStream>(p, _mm512_inserti64x4(l, _mm512_cvtps_ph(high, 0), 1));
}
// The lanes whose bits are set, at the front; whether that is an instruction.
constexpr bool kSqueezes = true;
FI_INLINE U squeezed(U v, uint32_t which) {
  return _mm512_maskz_compress_epi32((__mmask16)which, v);
}
// Those of up to 32 values whose bits are set.
template <class T>
FI_INLINE void put_where(T* p, const T* values, uint32_t which) {
  if (sizeof(T) == 2) {
    _mm512_mask_storeu_epi16(p, which, _mm512_maskz_loadu_epi16(which, values));
    return;
  }
  constexpr uint32_t kAtOnce = 64 / sizeof(T);
  for (; which != 0; which = kAtOnce < 32 ? which >> kAtOnce : 0, p += kAtOnce, values += kAtOnce) {
    if (sizeof(T) == 4) {
      const __mmask16 some = (__mmask16)which;
      _mm512_mask_storeu_ps(p, some, _mm512_maskz_loadu_ps(some, values));
    } else {
      const __mmask8 some = (__mmask8)which;
      _mm512_mask_storeu_pd(p, some, _mm512_maskz_loadu_pd(some, values));
    }
  }
}
FI_INLINE void fence() { _mm_sfence(); }

// One step of pairs: two groups of 16 words side by side.
FI_INLINE void load_pairs(const uint32_t* p, U& first, U& second) {
  const U a = load(p), b = load(p + 16);
  first = _mm512_shuffle_i64x2(a, b, 0x44);
  second = _mm512_shuffle_i64x2(a, b, 0xee);
}
FI_INLINE void join_pairs(F& first, F& second) {
  const F low = _mm512_shuffle_f32x4(first, second, 0x44);
  second = _mm512_shuffle_f32x4(first, second, 0xee);
  first = low;
}

// The keyed stream.
constexpr int kBlocks = 8;
constexpr int kParts = 1;
using W = __m512i;
FI_INLINE W count_from(uint64_t block) {
  const W order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_add_epi64(_mm512_set1_epi64((long long)block), order);
}
FI_INLINE W load_blocks(const uint64_t* p) {
  const W order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  return _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p));
}
FI_INLINE W all(uint64_t v) { return _mm512_set1_epi64((long long)v); }
FI_INLINE W product(W v, uint32_t by) {
  return _mm512_mul_epu32(v, _mm512_set1_epi64((long long)by));
}
FI_INLINE W upper(W v) { return _mm512_srli_epi64(v, 32); }
FI_INLINE W mix(W a, W b, uint32_t key) {
  return _mm512_ternarylogic_epi64(a, b, words(key), 0x96);
}
FI_INLINE void pair(W a, W b, U* out) {
  *out = _mm512_mask_shuffle_epi32(a, 0xaaaa, b, (_MM_PERM_ENUM)0xa0);
}
FI_INLINE void zip(F x, F y, F& low, F& high) {
  low = _mm512_unpacklo_ps(x, y);
  high = _mm512_unpackhi_ps(x, y);
}
FI_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FI_INLINE F plus(F a, F b) { return _mm512_add_ps(a, b); }
FI_INLINE F minus(F a, F b) { return _mm512_sub_ps(a, b); }
FI_INLINE F flip(F v, U by) {
  return view(_mm512_ternarylogic_epi32(bits(v), by, words(0x80000000), 0x78));
}
using M = __mmask16;
template <int n>
FI_INLINE M bit(U v) {
  return n == 31 ? _mm512_movepi32_mask(v) : _mm512_test_epi32_mask(v, words(1u << n));
}
FI_INLINE F either(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
FI_INLINE F plus_if(M m, F a, F b) { return _mm512_mask_add_ps(b, m, a, b); }
FI_INLINE F quotient(F a, F b) { return _mm512_div_ps(a, b); }
FI_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
FI_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
FI_INLINE F if_less(F a, F b, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

// Vectors for products.
template <class T>
using Wide = typename WideOf<T, 64>::type;
constexpr int kTileRows = 8;
FI_INLINE Wide<float> wide(float v) { return _mm512_set1_ps(v); }
FI_INLINE Wide<double> wide(double v) { return _mm512_set1_pd(v); }
FI_INLINE F mad(F a, F b, F c) { return fma(a, b, c); }
FI_INLINE __m512d mad(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
FI_INLINE F nmad(F a, F b, F c) { return fnma(a, b, c); }
FI_INLINE __m512d nmad(__m512d a, __m512d b, __m512d c) { return _mm512_fnmadd_pd(a, b, c); }

}  // namespace
FI_END_TARGET
}  // namespace avx512
}  // namespace fastinit
