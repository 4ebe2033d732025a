// SPDX-License-Identifier: BSD-3-Clause
// The kernel's body, compiled for the host: what the grid would write, tile after tile and lane
// after lane. Every store is counted, so that the tests see which element is written how often.

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "../../csrc/cuda/fill/tiles.h"

namespace {

struct Watched {
  uint64_t begin, end;
  uint8_t* counts;  // one for each byte
};
constexpr int kMost = 4096;
Watched watched[kMost];
int count_watched = 0;
uint64_t strays = 0;   // stores outside of what is watched, or not aligned to their size
uint64_t vectors = 0;  // stores of 16 bytes

}  // namespace

void fastinit::cuda::written(uint64_t address, uint64_t bytes) {
  if (bytes == 16) ++vectors;
  for (int i = 0; i < count_watched; ++i) {
    const Watched& w = watched[i];
    if (address < w.begin || address + bytes > w.end) continue;
    if (address % bytes != 0) ++strays;
    for (uint64_t b = 0; b < bytes; ++b) {
      uint8_t& n = w.counts[address - w.begin + b];
      if (n != 255) ++n;
    }
    return;
  }
  ++strays;
}

extern "C" {

void watch(uint64_t begin, uint64_t bytes, uint8_t* counts) {
  if (count_watched < kMost) watched[count_watched++] = {begin, begin + bytes, counts};
}

void forget() { count_watched = 0, strays = 0, vectors = 0; }
uint64_t count_strays() { return strays; }
uint64_t count_vectors() { return vectors; }

// As fill_kernel of csrc/cuda/fill/fill.cu. `backwards`: tiles in the other order, which must not
// matter where no fill waits for another.
int walk(const fastinit::cuda::FillTiles* fills, uint32_t count, uint32_t tiles,
         const fastinit::cuda::PhiloxSource* sources, fastinit::cuda::Progress* progress,
         int backwards) {
  using namespace fastinit::cuda;
  for (uint32_t n = 0; n < tiles; ++n) {
    const uint32_t tile = backwards ? tiles - 1 - n : n;
    const FillTiles* f =
        std::upper_bound(fills, fills + count, tile,
                         [](uint32_t t, const FillTiles& x) { return t < x.first_tile; }) -
        1;
    if (tile - f->first_tile >= f->tiles) return 1;
    uint64_t origin = sources[f->source].block;
    if (f->after >= 0) {
      if (!progress->slots[f->after].ready) return 2;
      origin = progress->slots[f->after].end;
    }
    uint32_t rounds = 0;
    for (uint32_t lane = 0; lane < kFillLanes; ++lane) {
      rounds = std::max(
          rounds, write_tile(*f, sources[f->source].seed, origin, tile - f->first_tile, lane));
    }
    if (f->op == fastinit::Op::trunc_normal) {
      Slot& slot = progress->slots[f->slot];
      slot.rounds = std::max(slot.rounds, rounds);
      if (++slot.tiles_done == f->slot_tiles) {
        slot.end = end_of(*f, origin, slot.rounds);
        slot.ready = 1;
      }
    }
  }
  return 0;
}

int size_of_fill() { return sizeof(fastinit::cuda::FillTiles); }

// Conversions and the laws' pieces that are the same on both sides, for tests of their own.
void round_all(const float* from, uint64_t n, uint16_t* bf16, uint16_t* f16) {
  for (uint64_t i = 0; i < n; ++i) {
    bf16[i] = fastinit::cuda::code_bf16(from[i]);
    f16[i] = fastinit::cuda::code_f16(from[i]);
  }
}
}
