// SPDX-License-Identifier: BSD-3-Clause
// The only place that looks at compilers: inlining, and regions compiled for one instruction set.
//
// An instruction set is switched on inside the source, never by a compiler flag: a flag would also
// let the compiler use it in the code that checks whether the processor has it.
#pragma once

#define FI_INLINE inline __attribute__((always_inline))
#define FI_PRAGMA(text) _Pragma(#text)

#if defined(__x86_64__)
#define FI_X86 1
#if defined(__clang__)
#define FI_BEGIN_TARGET(features) \
  FI_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FI_END_TARGET FI_PRAGMA(clang attribute pop)
#else
#define FI_BEGIN_TARGET(features) FI_PRAGMA(GCC push_options) FI_PRAGMA(GCC target(features))
#define FI_END_TARGET FI_PRAGMA(GCC pop_options)
#endif
#endif

// Formulas fix the place of every rounding; the compiler must not move one. setup.py passes
// -ffp-contract=off; this refuses a build that forgot it where the compiler tells.
#if defined(__FAST_MATH__)
#error "fastinit must not be compiled with -ffast-math: its results are defined bit by bit"
#endif

namespace fastinit {
// The compiler's own vectors, of so many bytes.
template <class T, int kBytes>
struct WideOf;
template <int kBytes>
struct WideOf<float, kBytes> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <int kBytes>
struct WideOf<double, kBytes> {
  typedef double type __attribute__((vector_size(kBytes)));
};
}  // namespace fastinit
