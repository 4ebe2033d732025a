// SPDX-License-Identifier: BSD-3-Clause
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include "../target.h"

namespace fastinit {
namespace cuda {

struct PhiloxWords {
  uint32_t w[4];
};

// The four words of a block in a subsequence, as cuRAND and torch number them.
FI_FN PhiloxWords philox(uint64_t seed, uint64_t block, uint64_t subsequence) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(subsequence), c3 = static_cast<uint32_t>(subsequence >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = mul_wide(c0, 0xD2511F53u), p1 = mul_wide(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace cuda
}  // namespace fastinit
