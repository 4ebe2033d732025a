// SPDX-License-Identifier: BSD-3-Clause
// The contract between Python (fastinit/cuda/fills.py packs it) and the kernel: one launch writes a
// list of fills. Every decision is taken before; the kernel only obeys.
#pragma once

#include <cstdint>

#include "../../fill_desc.h"

namespace fastinit {
namespace cuda {

constexpr uint32_t kFillLanes = 256;        // threads of a block, which is also torch's block
constexpr uint32_t kTileBytes = 16384;      // of a constant fill
constexpr uint32_t kMostSources = 8;        // generators of a launch
constexpr uint32_t kMostFillsInlined = 25;  // fills that travel in the kernel's arguments

// A strided destination, innermost dimension first, strides in elements. rank 0: dense memory.
struct Strided32 {
  uint32_t size[4];
  uint32_t stride[4];
};
FI_LAYOUT(Strided32, FI_FIELD(size), FI_FIELD(stride));

// As fastinit::Diagonal.
struct Diagonal32 {
  uint64_t row_length;
  uint32_t group_rows, channels, channel, centre, unused[2];
};
FI_LAYOUT(Diagonal32, FI_FIELD(row_length), FI_FIELD(group_rows), FI_FIELD(channels),
          FI_FIELD(channel), FI_FIELD(centre), FI_UNUSED(unused));

// A tensor, or a part of one that torch's 32-bit indexing makes it split.
//
// A random tile is the part `tile % ranges` of the subsequences in trip `tile / ranges` of torch's
// grid-stride loop: torch gives element i the output w of Philox block j of subsequence s, where
// i = (j * U + w) * threads + s and U is 4, for float64 2.
struct FillTiles {
  uint64_t address;  // of element 0; owned by the plan, which keeps the tensor alive
  uint64_t items;    // elements
  uint64_t block;    // first Philox block, counted from where the origin (see `after`) stands
  union {
    uint64_t mask;   // normal: address of 16 bits per element, 0 where it becomes zero; or 0
    uint64_t start;  // trunc_normal: block where the whole tensor starts
  };
  // constant: value. uniform: from, to. normal: mean, std. trunc_normal: mean, std, lo, hi.
  // trunc_erfinv: from, to, scale, mean, lo, hi.
  double p[6];
  uint64_t round_blocks;  // trunc_normal: blocks that one draw of the whole tensor takes
  uint32_t first_tile;    // of the launch
  uint32_t tiles;
  uint32_t ranges;
  uint32_t threads;  // of torch's grid
  int32_t after;  // the slot where the origin is found, once it is known; -1: the source's offset
  int32_t slot;   // trunc_normal: where the rounds are counted
  uint32_t slot_tiles;  // of all fills that count in the slot
  Op op;
  Dtype dtype;
  uint8_t rank;    // of `strided`; 0: dense
  uint8_t source;  // index into the launch's sources
  union {
    Strided32 strided;
    Diagonal32 diagonal;
  };
};
FI_LAYOUT(FillTiles, FI_FIELD(address), FI_FIELD(items), FI_FIELD(block), FI_FIELD(mask),
          FI_FIELD(p), FI_FIELD(round_blocks), FI_FIELD(first_tile), FI_FIELD(tiles),
          FI_FIELD(ranges), FI_FIELD(threads), FI_FIELD(after), FI_FIELD(slot),
          FI_FIELD(slot_tiles), FI_FIELD(op), FI_FIELD(dtype), FI_FIELD(rank), FI_FIELD(source),
          FI_BYTES(strided));

struct PhiloxSource {
  uint64_t seed;
  uint64_t block;  // the generator's offset / 4
};
FI_LAYOUT(PhiloxSource, FI_FIELD(seed), FI_FIELD(block));

// How far the rejections of one tensor have come. Zeroed before the launch.
struct Slot {
  uint64_t end;     // the block behind the last draw, valid once `ready`
  uint32_t rounds;  // most draws of an element, less one
  uint32_t tiles_done;
  uint32_t ready;
  uint32_t unused;
};
FI_LAYOUT(Slot, FI_FIELD(end), FI_FIELD(rounds), FI_FIELD(tiles_done), FI_FIELD(ready),
          FI_UNUSED(unused));

// Everything a launch gets. At most 4,096 bytes: what every driver takes.
struct FillArguments {
  uint64_t table;     // address of the fills in device memory; 0: they are inlined
  uint64_t progress;  // address of a Progress in device memory, if some fill has a slot; or 0
  uint32_t fills, tiles;
  PhiloxSource sources[kMostSources];
  FillTiles inlined[kMostFillsInlined];
};
FI_LAYOUT(FillArguments, FI_FIELD(table), FI_FIELD(progress), FI_FIELD(fills), FI_FIELD(tiles),
          FI_FIELD(sources), FI_FIELD(inlined));
static_assert(sizeof(FillArguments) <= 4096, "kernel arguments");

struct Progress {
  uint32_t next_tile, unused;
  Slot slots[1];  // as many as the fills need
};

}  // namespace cuda
}  // namespace fastinit
