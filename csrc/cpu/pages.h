// SPDX-License-Identifier: BSD-3-Clause
// Memory that nobody has touched yet.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastinit {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kTouched = 1 << 20;      // bytes; less is not worth three system calls
constexpr uint64_t kStreamBytes = 8 << 20;  // larger plans bypass the caches
constexpr double kTouchCost = 0.17;         // ns per byte of fresh memory in huge pages

// Whether nobody has touched the memory yet. Three pages are looked at, not all.
inline bool is_fresh(uint64_t address, uint64_t bytes) {
#ifdef __linux__
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (bytes < kTouched) return false;
  for (const uint64_t at : {begin, begin + (end - begin) / 2 / page * page, end - page}) {
    unsigned char resident = 1;
    if (mincore(reinterpret_cast<void*>(at), page, &resident) != 0 || (resident & 1)) return false;
  }
  return true;
#else
  return address == 0 && bytes == 0;
#endif
}

// Asks for huge pages where fresh memory is written in long ranges: first touch is then three to
// four times cheaper. Tensors that an allocator placed side by side count as one range.
inline void ask_for_huge_pages(std::vector<std::pair<uint64_t, uint64_t>> fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uint64_t kGap = 8192;  // the allocator's headers, alignment, small neighbours
  std::sort(fresh.begin(), fresh.end());
  for (size_t i = 0; i < fresh.size();) {
    uint64_t begin = fresh[i].first, end = fresh[i].second;
    for (++i; i < fresh.size() && fresh[i].first <= end + kGap; ++i) {
      end = std::max(end, fresh[i].second);
    }
    // Rounded outwards: what else lies in the first and the last page is, in most cases, the next
    // tensor. The kernel makes no huge page across the border of a mapping.
    begin = begin / kHugePage * kHugePage;
    end = (end + kHugePage - 1) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  fresh.clear();
#endif
}

}  // namespace fastinit
