// SPDX-License-Identifier: BSD-3-Clause
// Compiles the *.inl.h once per instruction set, and chooses between them at run time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "../keyed_desc.h"
#include "../pointwise_desc.h"
#include "surface.h"
#include "lanes_scalar.h"
#ifdef FI_X86
#include "lanes_avx2.h"
#include "lanes_avx512.h"
#endif

#define FI_LAW FI_INLINE  // dtypes.inl.h, laws.inl.h

// Everything per target lives in an unnamed namespace: no inline function of one target may be
// merged with its namesake of another.
namespace fastinit {
namespace scalar {
namespace {
#include "bodies.inl.h"
}  // namespace
}  // namespace scalar

#ifdef FI_X86
FI_BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
namespace {
#include "bodies.inl.h"
}  // namespace
}  // namespace avx2
FI_END_TARGET

FI_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
namespace {
#include "bodies.inl.h"
}  // namespace
}  // namespace avx512
FI_END_TARGET
#endif

namespace {

#ifdef FI_X86
bool has_avx2() {  // F16C is older than AVX2, and not every compiler can ask for it
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#define FI_TARGET(name, supported)                                  \
  {#name,       supported, name::skip,  name::jump,     name::fill, \
   name::trunc, name::qr,  name::keyed, name::pointwise}

// The one table: best first, name, required features and functions in the same row.
const Target kTargets[] = {
#ifdef FI_X86
    FI_TARGET(avx512, has_avx512),
    FI_TARGET(avx2, has_avx2),
#endif
    FI_TARGET(scalar, [] { return true; }),
};

}  // namespace

const Target* targets(int* count) {
  *count = sizeof kTargets / sizeof *kTargets;
  return kTargets;
}

const Target* find_target(const char* name) {
  for (const Target& t : kTargets) {
    const bool wanted = name == nullptr || *name == '\0' || strcmp(name, t.name) == 0;
    if (wanted && t.supported()) return &t;
  }
  return nullptr;
}

}  // namespace fastinit
