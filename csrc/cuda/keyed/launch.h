// SPDX-License-Identifier: BSD-3-Clause
// The contract between Python (fastinit/cuda/keyed.py packs it) and the kernel of the keyed stream:
// one launch writes a list of fills. Every decision is taken before; the kernel only obeys.
#pragma once

#include <cstdint>

#include "../../keyed_desc.h"

namespace fastinit {
namespace cuda {

constexpr uint32_t kKeyedLanes = 256;       // threads of a block
constexpr uint32_t kUnitsPerLane = 4;       // of a tile
constexpr uint32_t kMostKeyedInlined = 11;  // fills that travel in the kernel's arguments

// A unit is what a lane does at a time: the elements of one row whose indices, divided by the
// number of elements in 16 bytes, give the same quotient. A row is a run along dimension 0, if its
// step is 1; otherwise an element.
//
// Units are counted along the axes, those first that are nearest in memory: an axis is a dimension
// of the fill, or the units of a row (dimension 0, if rows are runs). number / size is
// (upper(number * magic) + number) >> shift, for numbers below 2^31 (Granlund and Montgomery 1994).
struct KeyedAxis {
  uint32_t size, magic;
  uint8_t shift, dim, unused[2];
};
FI_LAYOUT(KeyedAxis, FI_FIELD(size), FI_FIELD(magic), FI_FIELD(shift), FI_FIELD(dim),
          FI_UNUSED(unused));

struct KeyedTiles {
  KeyedDesc fill;
  uint32_t first_tile;  // of the launch
  uint32_t tiles;
  uint32_t units;    // less than 2^31
  uint8_t is_dense;  // one run, which begins with a whole unit at a multiple of 16 bytes
  uint8_t is_row;    // whether rows are runs
  uint8_t axes;
  uint8_t unused;
  KeyedAxis axis[kMostDims];
  uint32_t unused_end;
};
FI_LAYOUT(KeyedTiles, FI_FIELD(fill), FI_FIELD(first_tile), FI_FIELD(tiles), FI_FIELD(units),
          FI_FIELD(is_dense), FI_FIELD(is_row), FI_FIELD(axes), FI_UNUSED(unused), FI_FIELD(axis),
          FI_UNUSED(unused_end));

struct KeyedArguments {
  uint64_t table;  // address of the fills in device memory; 0: they are inlined
  uint32_t fills, tiles;
  KeyedTiles inlined[kMostKeyedInlined];
};
FI_LAYOUT(KeyedArguments, FI_FIELD(table), FI_FIELD(fills), FI_FIELD(tiles), FI_FIELD(inlined));
static_assert(sizeof(KeyedArguments) <= 4096, "kernel arguments");

}  // namespace cuda
}  // namespace fastinit
