// SPDX-License-Identifier: BSD-3-Clause
// What one lane of a block writes of one tile of a keyed fill.
#pragma once

#include <type_traits>

#include "launch.h"
#include "../lanes.h"

namespace fastinit {
namespace cuda {
namespace keyed {

template <Dtype dtype>
struct Stored {
  using T = std::conditional_t<dtype == Dtype::f64, double,
                               std::conditional_t<dtype == Dtype::f32, float, uint16_t>>;
  static constexpr uint32_t kUnit = 16 / sizeof(T), kPerBlock = sizeof(T) == 8 ? 2 : 4;
};

FI_FN void put(Pack& pack, int i, double x) {
  pack.x[2 * i] = static_cast<uint32_t>(bits64(x));
  pack.x[2 * i + 1] = static_cast<uint32_t>(bits64(x) >> 32);
}
FI_FN void store_one(uint64_t to, const Pack& pack, int i, double) {
  cuda::store(to, view64(static_cast<uint64_t>(pack.x[2 * i + 1]) << 32 | pack.x[2 * i]));
}
FI_FN void store_one(uint64_t to, const Pack& pack, int i, float) {
  cuda::store(to, view(pack.x[i]));
}
FI_FN void store_one(uint64_t to, const Pack& pack, int i, uint16_t) {
  cuda::store(to, static_cast<uint16_t>(pack.x[i / 2] >> i % 2 * 16));
}

// Where a unit lies and which of its elements are there.
struct UnitPlace {
  uint64_t index;  // of element 0 in the whole parameter, whether it is there or not
  uint64_t to;     // where element 0 is written, or would be
  int64_t stride;  // bytes between elements
  uint32_t begin, end;
};

// Elements from a law, which was made ready once for the fill. `unit`: those of the unit that
// begins with a block, as they lie in memory; at least elements [begin, end).
template <Dtype dtype, class Law>
struct Drawn {
  Law law;
  uint64_t key;

  FI_FN explicit Drawn(const KeyedDesc& f) : law(f.p), key(f.key) {}
  FI_FN void block(uint64_t number, F* x) const {
    W w[4];
    philox(key, number, upper(number), 0, w);
    law(static_cast<U>(w[0]), static_cast<U>(w[1]), x, x + 1);
    law(static_cast<U>(w[2]), static_cast<U>(w[3]), x + 2, x + 3);
  }
  FI_FN void block(uint64_t number, double* x) const {
    W w[4];
    philox(key, number, upper(number), 0, w);
    law(w[0] << 32 | static_cast<U>(w[1]), w[2] << 32 | static_cast<U>(w[3]), x, x + 1);
  }
  FI_FN Pack unit(uint64_t number, uint32_t begin, uint32_t end) const {
    Pack pack = {};
    if constexpr (dtype == Dtype::f64) {
      double x[2];
      block(number, x);
      put(pack, 0, x[0]);
      put(pack, 1, x[1]);
    } else if constexpr (dtype == Dtype::f32) {
      F x[4];
      block(number, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.x[i] = bits(x[i]);
    } else {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        if (begin >= 4 * half + 4 || end <= 4 * half) continue;
        F x[4];
        block(number + half, x);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          pack.x[2 * half + i] = dtype == Dtype::bf16 ? pair_bf16(x[2 * i], x[2 * i + 1])
                                                      : pair_f16(x[2 * i], x[2 * i + 1]);
        }
      }
    }
    return pack;
  }
};

// Constants, and the zeros and ones of eye_ and dirac_.
template <Dtype dtype>
struct Known {
  using T = typename Stored<dtype>::T;
  Pack values;
  fastinit::Diagonal diagonal;
  bool has_ones;

  static FI_FN Pack everywhere(double value) {
    Pack pack;
    if constexpr (dtype == Dtype::f64) {
      put(pack, 0, value);
      put(pack, 1, value);
    } else {
      const float x = static_cast<float>(value);
      const uint32_t code = dtype == Dtype::f32    ? bits(x)
                            : dtype == Dtype::bf16 ? pair_bf16(x, x)
                                                   : pair_f16(x, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.x[i] = code;
    }
    return pack;
  }
  FI_FN explicit Known(const KeyedDesc& f)
      : values(everywhere(f.p[0])), diagonal(f.diagonal), has_ones(f.op == Op::diagonal) {}

  // The place of a row's one, or what no place is.
  FI_FN uint64_t one_of(uint64_t channel) const {
    if (channel >= static_cast<uint64_t>(diagonal.channels)) return ~uint64_t{0};
    return channel * static_cast<uint64_t>(diagonal.channel) +
           static_cast<uint64_t>(diagonal.centre);
  }
  FI_FN Pack unit(uint64_t number, uint32_t, uint32_t) const {
    Pack pack = values;
    if (!has_ones) return pack;
    const uint64_t index = number * Stored<dtype>::kPerBlock;
    const Pack ones = everywhere(1.0);
    const uint64_t length = static_cast<uint64_t>(diagonal.row_length);
    const uint64_t rows = static_cast<uint64_t>(diagonal.group_rows);
    const uint64_t row = index / length;
    uint64_t at = index - row * length, channel = row % rows, one = one_of(channel);
#pragma unroll
    for (uint32_t i = 0; i < Stored<dtype>::kUnit; ++i) {
      if (at == one) {
        constexpr uint32_t kSize = sizeof(T), kWords = kSize == 8 ? 2 : 1;
#pragma unroll
        for (uint32_t k = i * kSize / 4; k < i * kSize / 4 + kWords; ++k) {
          const uint32_t mask = kSize != 2 ? ~0u : i % 2 == 0 ? 0xFFFFu : 0xFFFF0000u;
          pack.x[k] = (pack.x[k] & ~mask) | (ones.x[k] & mask);
        }
      }
      if (++at == length) {
        at = 0;
        if (++channel == rows) channel = 0;
        one = one_of(channel);
      }
    }
    return pack;
  }
};

FI_FN UnitPlace find_unit(const KeyedTiles& tiles, uint32_t number, uint32_t size) {
  const KeyedDesc& f = tiles.fill;
  const uint32_t of_unit = 16 / size;
  uint64_t index = f.index, in_row = 0;
  int64_t offset = 0;
#pragma unroll 1
  for (uint32_t k = 0; k < tiles.axes; ++k) {
    const KeyedAxis& axis = tiles.axis[k];
    const uint32_t high = static_cast<uint32_t>(mul_wide(number, axis.magic) >> 32);
    const uint32_t next = (high + number) >> axis.shift, at = number - next * axis.size;
    number = next;
    if (tiles.is_row && axis.dim == 0) {
      in_row = at;
    } else {
      index += at * static_cast<uint64_t>(f.dim[axis.dim].step);
      offset += at * f.dim[axis.dim].stride;
    }
  }
  const int64_t stride = f.dim[0].stride;
  const uint32_t lead = static_cast<uint32_t>(index % of_unit);  // of the row in its first unit
  const uint64_t before = in_row * of_unit;                      // elements of units before
  const uint64_t end = lead + (tiles.is_row ? static_cast<uint64_t>(f.dim[0].size) : 1);
  offset += (static_cast<int64_t>(before) - static_cast<int64_t>(lead)) * stride;
  UnitPlace u;
  u.index = index - lead + before;
  u.to = f.address + static_cast<uint64_t>(offset * static_cast<int64_t>(size));
  u.stride = stride * static_cast<int64_t>(size);
  u.begin = before == 0 ? lead : 0;
  u.end = end <= before            ? 0
          : end - before < of_unit ? static_cast<uint32_t>(end - before)
                                   : of_unit;
  return u;
}

template <Dtype dtype, class What>
FI_FN void write_units(const KeyedTiles& tiles, const What& prepared, uint32_t tile,
                       uint32_t lane) {
  using T = typename Stored<dtype>::T;
  constexpr uint32_t kUnit = Stored<dtype>::kUnit;
  constexpr uint32_t kTileUnits = kKeyedLanes * kUnitsPerLane;
  const What what = prepared;
  if (tiles.is_dense != 0 && uint64_t{tile + 1} * kTileUnits * kUnit <= tiles.fill.items) {
    const uint64_t first = uint64_t{tile} * kTileUnits + lane;
    constexpr int kUnroll = sizeof(T) == 4 ? 2 : 1;  // 8 elements at a time; more would spill
    constexpr uint32_t kBlocks = kUnit / Stored<dtype>::kPerBlock;
    uint64_t to = tiles.fill.address + first * 16;
    uint64_t block = tiles.fill.index / Stored<dtype>::kPerBlock + first * kBlocks;
#pragma unroll kUnroll
    for (uint32_t k = 0; k < kUnitsPerLane; ++k) {
      cuda::store(to, what.unit(block, 0, kUnit));
      to += kKeyedLanes * 16;
      block += kKeyedLanes * kBlocks;
    }
    return;
  }
#pragma unroll 1
  for (uint32_t k = 0; k < kUnitsPerLane; ++k) {
    const uint32_t number = tile * kTileUnits + k * kKeyedLanes + lane;
    if (number >= tiles.units) return;
    const UnitPlace u = find_unit(tiles, number, sizeof(T));
    if (u.begin >= u.end) continue;
    const Pack pack = what.unit(u.index / Stored<dtype>::kPerBlock, u.begin, u.end);
    if (u.begin == 0 && u.end == kUnit && u.stride == sizeof(T) && u.to % 16 == 0) {
      cuda::store(u.to, pack);
      continue;
    }
#pragma unroll
    for (uint32_t i = 0; i < kUnit; ++i) {
      if (i >= u.begin && i < u.end) {
        store_one(u.to + static_cast<uint64_t>(i * u.stride), pack, static_cast<int>(i), T());
      }
    }
  }
}

// Room for what a fill needs ready, whatever its law.
struct alignas(16) Prepared {
  unsigned char bytes[128];
};

// Does `job` with the type of what the fill writes.
template <Dtype dtype, class Job>
FI_FN void with_law(Op op, const Job& job) {
  constexpr bool kDouble = dtype == Dtype::f64;
  switch (op) {
    case Op::uniform:
      return job.template go<
          dtype, Drawn<dtype, std::conditional_t<kDouble, KeyedUniform64, KeyedUniform>>>();
    case Op::normal:
      return job.template go<
          dtype, Drawn<dtype, std::conditional_t<kDouble, KeyedNormal64, KeyedNormal>>>();
    case Op::trunc_normal:
      return job.template go<
          dtype, Drawn<dtype, std::conditional_t<kDouble, KeyedTruncated64, KeyedTruncated>>>();
    default:  // constant and diagonal; cuda/keyed.py sends nothing else
      return job.template go<dtype, Known<dtype>>();
  }
}

template <class Job>
FI_FN void with_kind(const KeyedDesc& f, const Job& job) {
  as_dtype(f.dtype, [&](auto dtype) { with_law<decltype(dtype)::value>(f.op, job); });
}

struct Prepare {
  const KeyedDesc& fill;
  Prepared* to;
  template <Dtype dtype, class What>
  FI_FN void go() const {
    static_assert(sizeof(What) <= sizeof(Prepared), "room");
    *reinterpret_cast<What*>(to) = What(fill);
  }
};

struct Write {
  const KeyedTiles& tiles;
  const Prepared& prepared;
  uint32_t tile, lane;
  template <Dtype dtype, class What>
  FI_FN void go() const {
    write_units<dtype>(tiles, reinterpret_cast<const What&>(prepared), tile, lane);
  }
};

}  // namespace keyed

// What is the same for all tiles of a fill; by one lane.
FI_FN void prepare(const KeyedDesc& f, keyed::Prepared* to) {
  keyed::with_kind(f, keyed::Prepare{f, to});
}

FI_FN void write_tile(const KeyedTiles& tiles, const keyed::Prepared& prepared, uint32_t tile,
                      uint32_t lane) {
  keyed::with_kind(tiles.fill, keyed::Write{tiles, prepared, tile, lane});
}

}  // namespace cuda
}  // namespace fastinit
