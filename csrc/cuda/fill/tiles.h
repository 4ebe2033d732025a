// SPDX-License-Identifier: BSD-3-Clause
// What one lane of a block writes of one tile of a fill.
#pragma once

#include "laws.h"

namespace fastinit {
namespace cuda {

FI_FN uint64_t strided_offset(const FillTiles& f, uint32_t i) {
  uint64_t offset = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k >= f.rank) break;
    const uint32_t size = f.strided.size[k], rest = i / size;
    offset += uint64_t{i - rest * size} * f.strided.stride[k];
    i = rest;
  }
  return offset;
}

template <class T>
FI_FN void store_element(const FillTiles& f, uint32_t i, T value) {
  store(f.address + (f.rank == 0 ? i : strided_offset(f, i)) * sizeof(T), value);
}

FI_FN void put(Pack& pack, int i, float x) { pack.x[i] = bits(x); }
FI_FN void put(Pack& pack, int i, uint16_t x) {
  pack.x[i / 2] = i % 2 == 0 ? x : pack.x[i / 2] | static_cast<uint32_t>(x) << 16;
}
FI_FN void store_one(uint64_t to, const Pack& pack, int i, float) { store(to, view(pack.x[i])); }
FI_FN void store_one(uint64_t to, const Pack& pack, int i, uint16_t) {
  store(to, static_cast<uint16_t>(pack.x[i / 2] >> i % 2 * 16));
}

// Where a lane stands in a random tile. Pieces have fewer than 2^31 elements, as torch's own have.
template <class T>
struct LanePlace {
  static constexpr uint32_t kVector = 16 / sizeof(T);
  static constexpr uint32_t kOf = kPerBlock<T>;
  uint32_t items, threads;
  uint32_t range;  // first subsequence of the tile
  uint32_t first;  // element 0 of this trip
  uint64_t block;

  FI_FN LanePlace(const FillTiles& f, uint64_t origin, uint32_t tile)
      : items(static_cast<uint32_t>(f.items)), threads(f.threads) {
    const uint32_t trip = tile / f.ranges;
    range = (tile - trip * f.ranges) * (kFillLanes * kVector);
    first = trip * kOf * threads;
    block = origin + f.block + trip;
  }
  FI_FN bool has_one_output() const { return items - first <= threads; }
};

// Elements next to each other belong to subsequences next to each other: one lane takes as many as
// fill 16 bytes, and writes one such vector for each output of a block.
template <int count, class T, class Law>
FI_FN void write_vectors(const FillTiles& f, const Law& law, uint64_t seed, const LanePlace<T>& at,
                         uint32_t lane) {
  constexpr int kVector = LanePlace<T>::kVector;
  const uint32_t sub = at.range + lane * kVector;
  if (sub >= at.threads || at.first + sub >= at.items) return;
  Pack packs[count];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    T out[LanePlace<T>::kOf];
    law.template draw<count>(philox(seed, at.block, sub + v), out);
#pragma unroll
    for (int w = 0; w < count; ++w) put(packs[w], v, out[w]);
  }
#pragma unroll
  for (int w = 0; w < count; ++w) {
    const uint32_t i = at.first + w * at.threads + sub;
    const uint64_t to = f.address + uint64_t{i} * sizeof(T);
    if (i + kVector <= at.items) {
      store(to, packs[w]);
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (i + v < at.items) store_one(to + v * sizeof(T), packs[w], v, T());
      }
    }
  }
}

FI_FN bool is_zeroed(const FillTiles& f, uint32_t i) {
  return f.mask != 0 && reinterpret_cast<const uint16_t*>(f.mask)[i] == 0;
}

// The same one by one, for strided and unaligned tensors, float64 and masks.
template <class T, class Law>
FI_FN void write_elements(const FillTiles& f, const Law& law, uint64_t seed, const LanePlace<T>& at,
                          uint32_t lane) {
  for (uint32_t v = 0; v < LanePlace<T>::kVector; ++v) {
    const uint32_t sub = at.range + v * kFillLanes + lane;
    if (sub >= at.threads || at.first + sub >= at.items) return;
    T out[LanePlace<T>::kOf];
    const PhiloxWords words = philox(seed, at.block, sub);
    if (at.has_one_output()) {
      law.template draw<1>(words, out);
    } else {
      law.template draw<LanePlace<T>::kOf>(words, out);
    }
#pragma unroll
    for (uint32_t w = 0; w < LanePlace<T>::kOf; ++w) {
      const uint32_t i = at.first + w * at.threads + sub;
      if (i >= at.items) break;
      store_element(f, i, f.op == Op::normal && is_zeroed(f, i) ? T() : out[w]);
    }
  }
}

template <Dtype dtype, class Law>
FI_FN void write_random(const FillTiles& f, uint64_t seed, uint64_t origin, uint32_t tile,
                        uint32_t lane) {
  using T = typename Element<dtype>::T;
  const Law law(f.p);
  const LanePlace<T> at(f, origin, tile);
  if constexpr (sizeof(T) < 8 && !std::is_same_v<Law, TruncErfinv<dtype>>) {
    const bool dense = f.rank == 0 && f.address % 16 == 0;
    if (dense && !(f.op == Op::normal && f.mask != 0)) {
      if (at.has_one_output()) return write_vectors<1>(f, law, seed, at, lane);
      return write_vectors<4>(f, law, seed, at, lane);
    }
  }
  write_elements(f, law, seed, at, lane);
}

// trunc_normal_ of torch 2.12 and later draws the whole tensor until all of it is inside: an
// element takes the first of its draws that is. Returns how many draws more than one were needed.
template <Dtype dtype>
FI_FN uint32_t write_truncated(const FillTiles& f, uint64_t seed, uint64_t origin, uint32_t tile,
                               uint32_t lane) {
  using E = Element<dtype>;
  using T = typename E::T;
  const Normal<dtype> law(f.p);
  const typename E::A lo = static_cast<typename E::A>(f.p[2]);
  const typename E::A hi = static_cast<typename E::A>(f.p[3]);
  const LanePlace<T> at(f, origin, tile);
  uint32_t most = 0;
  for (uint32_t v = 0; v < LanePlace<T>::kVector; ++v) {
    const uint32_t sub = at.range + v * kFillLanes + lane;
    if (sub >= at.threads || at.first + sub >= at.items) break;
    uint32_t pending = 0;
#pragma unroll
    for (uint32_t w = 0; w < LanePlace<T>::kOf; ++w) {
      if (at.first + w * at.threads + sub < at.items) pending |= 1u << w;
    }
    for (uint32_t round = 0; pending != 0; ++round) {
      T out[LanePlace<T>::kOf];
      law.template draw<LanePlace<T>::kOf>(philox(seed, at.block + round * f.round_blocks, sub),
                                           out);
#pragma unroll
      for (uint32_t w = 0; w < LanePlace<T>::kOf; ++w) {
        const typename E::A x = E::value(out[w]);
        if ((pending >> w & 1) != 0 && !(x < lo) && !(x > hi)) {
          store_element(f, at.first + w * at.threads + sub, out[w]);
          pending &= ~(1u << w);
        }
      }
      if (pending != 0 && round >= most) most = round + 1;
    }
  }
  return most;
}

// The block behind all draws of a rejecting fill.
FI_FN uint64_t end_of(const FillTiles& f, uint64_t origin, uint32_t rounds) {
  return origin + f.start + (uint64_t{rounds} + 1) * f.round_blocks;
}

FI_FN bool is_one(const FillTiles& f, uint64_t i) {
  if (f.op != Op::diagonal) return false;
  const Diagonal32& d = f.diagonal;
  const uint64_t row = i / d.row_length;
  const uint32_t channel = static_cast<uint32_t>(row % d.group_rows);
  return channel < d.channels && i - row * d.row_length == uint64_t{channel} * d.channel + d.centre;
}

// constant, eye_ and dirac_. Tiles lie on a grid of 16 bytes whatever the tensor's own alignment.
template <Dtype dtype>
FI_FN void write_constant(const FillTiles& f, uint32_t tile, uint32_t lane) {
  using E = Element<dtype>;
  using T = typename E::T;
  constexpr uint32_t kVector = 16 / sizeof(T);
  const T value = E::code(static_cast<typename E::A>(f.p[0]));
  const T one = E::code(1);
  if (f.rank != 0) {
    constexpr uint32_t kItems = kTileBytes / sizeof(T);
    for (uint32_t i = tile * kItems + lane; i < (tile + 1) * kItems; i += kFillLanes) {
      if (i < f.items) store_element(f, i, value);
    }
    return;
  }
  const uint64_t lead = f.address % 16 / sizeof(T);  // elements between the grid and the tensor
  for (uint32_t k = 0; k < kTileBytes / 16 / kFillLanes; ++k) {
    const uint64_t at =
        uint64_t{tile} * (kTileBytes / sizeof(T)) + (k * kFillLanes + lane) * kVector;
    if (at >= lead + f.items) return;
    if constexpr (sizeof(T) < 8) {
      if (f.op == Op::constant && at >= lead && at - lead + kVector <= f.items) {
        Pack pack;
#pragma unroll
        for (uint32_t v = 0; v < kVector; ++v) put(pack, static_cast<int>(v), value);
        store(f.address + (at - lead) * sizeof(T), pack);
        continue;
      }
    }
    for (uint32_t v = 0; v < kVector; ++v) {
      if (at + v < lead || at + v - lead >= f.items) continue;
      const uint64_t i = at + v - lead;
      store(f.address + i * sizeof(T), is_one(f, i) ? one : value);
    }
  }
}

template <Dtype dtype>
FI_FN uint32_t write_tile_of(const FillTiles& f, uint64_t seed, uint64_t origin, uint32_t tile,
                             uint32_t lane) {
  switch (f.op) {
    case Op::uniform:
      write_random<dtype, Uniform<dtype>>(f, seed, origin, tile, lane);
      return 0;
    case Op::normal:
      write_random<dtype, Normal<dtype>>(f, seed, origin, tile, lane);
      return 0;
    case Op::trunc_normal:
      return write_truncated<dtype>(f, seed, origin, tile, lane);
    case Op::trunc_erfinv:
      write_random<dtype, TruncErfinv<dtype>>(f, seed, origin, tile, lane);
      return 0;
    default:  // constant and diagonal; cuda/fills.py sends nothing else
      write_constant<dtype>(f, tile, lane);
      return 0;
  }
}

// `origin`: the block from which the fill counts. Returns the rounds of trunc_normal, less one.
FI_FN uint32_t write_tile(const FillTiles& f, uint64_t seed, uint64_t origin, uint32_t tile,
                          uint32_t lane) {
  return as_dtype(f.dtype, [&](auto dtype) {
    return write_tile_of<decltype(dtype)::value>(f, seed, origin, tile, lane);
  });
}

}  // namespace cuda
}  // namespace fastinit
