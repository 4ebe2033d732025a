// SPDX-License-Identifier: BSD-3-Clause
// The body of the keyed stream's kernel, compiled for the host: what the grid would write, tile
// after tile and lane after lane. Every store is counted.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../csrc/cuda/keyed/units.h"

namespace {

struct Watched {
  uint64_t begin, end;
  uint8_t* counts;  // one for each byte
};
std::vector<Watched> watched;
uint64_t strays = 0;   // stores outside of what is watched, or not aligned to their size
uint64_t vectors = 0;  // stores of 16 bytes

}  // namespace

void fastinit::cuda::written(uint64_t address, uint64_t bytes) {
  if (bytes == 16) ++vectors;
  if (address % bytes != 0) ++strays;
  for (const Watched& w : watched) {
    if (address < w.begin || address + bytes > w.end) continue;
    for (uint64_t b = 0; b < bytes; ++b) {
      uint8_t& n = w.counts[address - w.begin + b];
      if (n != 255) ++n;
    }
    return;
  }
  if (!watched.empty()) ++strays;
}

extern "C" {

void watch(uint64_t begin, uint64_t bytes, uint8_t* counts) {
  watched.push_back({begin, begin + bytes, counts});
}

void forget() { watched.clear(), strays = 0, vectors = 0; }
uint64_t count_strays() { return strays; }
uint64_t count_vectors() { return vectors; }

// As keyed_kernel of csrc/cuda/keyed/keyed.cu, by `blocks` blocks, which come in turn. `backwards`:
// tiles in the other order, which must not matter. 1: a tile is of no fill.
int walk_keyed(const fastinit::cuda::KeyedTiles* fills, uint32_t count, uint32_t tiles,
               uint32_t blocks, int backwards) {
  using namespace fastinit::cuda;
  struct Current {
    KeyedTiles tiles;
    keyed::Prepared prepared;
  };
  std::vector<Current> at(blocks);  // all zeros: no tiles
  for (uint32_t n = 0; n < tiles; ++n) {
    const uint32_t tile = backwards ? tiles - 1 - n : n;
    Current& now = at[tile % blocks];
    if (tile - now.tiles.first_tile >= now.tiles.tiles) {
      now.tiles =
          *(std::upper_bound(fills, fills + count, tile,
                             [](uint32_t t, const KeyedTiles& x) { return t < x.first_tile; }) -
            1);
      prepare(now.tiles.fill, &now.prepared);
    }
    if (tile - now.tiles.first_tile >= now.tiles.tiles) return 1;
    for (uint32_t lane = 0; lane < kKeyedLanes; ++lane) {
      write_tile(now.tiles, now.prepared, tile - now.tiles.first_tile, lane);
    }
  }
  return 0;
}

int size_of_fill() { return sizeof(fastinit::KeyedDesc); }
int size_of_tiles() { return sizeof(fastinit::cuda::KeyedTiles); }
int most_inlined() { return fastinit::cuda::kMostKeyedInlined; }
}
