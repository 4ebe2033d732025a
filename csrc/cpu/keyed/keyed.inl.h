// SPDX-License-Identifier: BSD-3-Clause
// Loops over the elements of a keyed fill. Compiled once per target.

FI_INLINE uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

// How a dtype's elements come out of a step of blocks.
template <Dtype dtype>
struct KeyedElement {
  using E = Element<dtype>;
  using T = typename E::T;
  static constexpr int kPerBlock = 4;
  template <bool kStream, class Law>
  static FI_INLINE void write(const Law& law, uint64_t key, W blocks, W high, T* out) {
    W w[4];
    philox(key, blocks, high, 0, w);
    U first[kParts], second[kParts];
    pair(w[0], w[2], first);
    pair(w[1], w[3], second);
    for (int i = 0; i < kParts; ++i) {
      F x, y, low, high;
      law(first[i], second[i], &x, &y);
      zip(x, y, low, high);
      T* const to = out + 2 * kLanes * i;
      if constexpr (kLanes == kPairs) {
        E::template store<kStream>(to, E::coded(low), E::coded(high));
      } else {
        T apart[2 * kPairs];
        E::template store<false>(apart, E::coded(low), E::coded(high));
        to[0] = apart[0];
        to[1] = apart[kPairs];
      }
    }
  }
};

template <>
struct KeyedElement<Dtype::f64> {
  using T = double;
  static constexpr int kPerBlock = 2;
  template <bool kStream, class Law>
  static FI_INLINE void write(const Law& law, uint64_t key, W blocks, W high, T* out) {
    W w[4];
    philox(key, blocks, high, 0, w);
    uint64_t word[4][kBlocks];
    for (int i = 0; i < 4; ++i) memcpy(word[i], &w[i], sizeof w[i]);
    double x[kBlocks], y[kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
      law(word[0][i] << 32 | (word[1][i] & 0xFFFFFFFF),
          word[2][i] << 32 | (word[3][i] & 0xFFFFFFFF), x + i, y + i);
    }
    for (int i = 0; i < kBlocks; ++i) {  // a block's place in the order of count_from
      const int at = kBlocks == 1 ? 0 : (i & 1) * (kBlocks / 2) + i / 2;
      out[2 * at] = x[i];
      out[2 * at + 1] = y[i];
    }
  }
};

// Elements [index, index + count), one behind the other.
template <class E, bool kStream, class Law>
void write_span(const Law& law, uint64_t key, uint64_t index, typename E::T* out, uint64_t count) {
  using T = typename E::T;
  constexpr uint64_t kStep = kBlocks * E::kPerBlock;
  alignas(64) T some[kStep];
  const auto write_some = [&](uint64_t skipped, uint64_t n) __attribute__((always_inline)) {
    const W blocks = count_from(index / E::kPerBlock);
    E::template write<false>(law, key, blocks, upper(blocks), some);
    memcpy(out, some + skipped, n * sizeof(T));
    index += n;
    out += n;
    count -= n;
  };
  // Up to the first block that is written from its beginning, and, if the cache is bypassed, at the
  // beginning of a line.
  const uint64_t skipped = index % E::kPerBlock;
  if (skipped != 0) write_some(skipped, least(count, kStep - skipped));
  if (kStream) {
    const uint64_t line = reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T);
    const uint64_t n = line == 0 ? 0 : 64 / sizeof(T) - line;
    if (n % E::kPerBlock != 0) return write_span<E, false>(law, key, index, out, count);
    for (uint64_t left = least(n, count); left != 0;) {
      const uint64_t some_of = least(left, kStep);
      write_some(0, some_of);
      left -= some_of;
    }
  }
  while (count >= kStep) {
    uint64_t block = index / E::kPerBlock;
    const W high = all(block >> 32);
    // As many steps as have the same upper half.
    const uint64_t steps =
        least(count / kStep, ((uint64_t{1} << 32) - (block & 0xFFFFFFFF)) / kBlocks);
    if (steps == 0) write_some(0, kStep);
    for (uint64_t i = 0; i < steps; ++i, block += kBlocks, out += kStep) {
      E::template write<kStream>(law, key, count_from(block), high, out);
    }
    index += steps * kStep;
    count -= steps * kStep;
  }
  if (count != 0) write_some(0, count);
}

// Walks through the elements of a fill from item `first`, dimension 0 fastest.
struct ItemWalk {
  const KeyedDesc& d;
  uint64_t at[kMostDims] = {};
  uint64_t index;
  int64_t offset = 0;

  ItemWalk(const KeyedDesc& fill, uint64_t first) : d(fill), index(fill.index) {
    for (int k = 0; k < d.rank; ++k) {
      at[k] = first % static_cast<uint64_t>(d.dim[k].size);
      first /= static_cast<uint64_t>(d.dim[k].size);
      index += at[k] * static_cast<uint64_t>(d.dim[k].step);
      offset += static_cast<int64_t>(at[k]) * d.dim[k].stride;
    }
  }
  uint64_t left_in_row() const { return static_cast<uint64_t>(d.dim[0].size) - at[0]; }
  void advance(uint64_t n) {  // at most to the end of the row
    for (int k = 0;; n = 1) {
      at[k] += n;
      index += n * static_cast<uint64_t>(d.dim[k].step);
      offset += static_cast<int64_t>(n) * d.dim[k].stride;
      if (at[k] != static_cast<uint64_t>(d.dim[k].size) || k + 1 == d.rank) return;
      index -= at[k] * static_cast<uint64_t>(d.dim[k].step);
      offset -= static_cast<int64_t>(at[k]) * d.dim[k].stride;
      at[k++] = 0;
    }
  }
};

// Rows too short for a step, or whose elements do not follow each other: blocks are collected from
// wherever they are.
template <class E, class Law>
void write_scattered(const Law& law, const KeyedDesc& d, ItemWalk walk, uint64_t items) {
  using T = typename E::T;
  constexpr uint32_t kMost = 128;
  alignas(64) T values[kMost * E::kPerBlock];
  uint64_t block[kMost];
  uint16_t from[kMost * E::kPerBlock];
  int64_t to[kMost * E::kPerBlock];
  T* const base = reinterpret_cast<T*>(d.address);
  while (items != 0) {
    uint32_t blocks = 0, n = 0;
    for (; items != 0 && n < kMost * E::kPerBlock; ++n, --items) {
      const uint64_t b = walk.index / E::kPerBlock;
      if (blocks == 0 || block[blocks - 1] != b) {
        if (blocks == kMost) break;
        block[blocks++] = b;
      }
      from[n] = static_cast<uint16_t>((blocks - 1) * E::kPerBlock + walk.index % E::kPerBlock);
      to[n] = walk.offset;
      walk.advance(1);
    }
    for (uint32_t i = blocks; i % kBlocks != 0; ++i) block[i] = block[blocks - 1];
    for (uint32_t i = 0; i < blocks; i += kBlocks) {
      const W some = load_blocks(block + i);
      E::template write<false>(law, d.key, some, upper(some), values + i * E::kPerBlock);
    }
    for (uint32_t i = 0; i < n; ++i) base[to[i]] = values[from[i]];
  }
}

// Items [begin, end) of a law.
template <Dtype dtype, class Law>
void write_keyed(const KeyedDesc& d, uint64_t begin, uint64_t end, bool stream) {
  using E = KeyedElement<dtype>;
  using T = typename E::T;
  constexpr uint64_t kShort = 2 * kBlocks * E::kPerBlock;
  const Law law(d.p);
  ItemWalk walk(d, begin);
  if (d.dim[0].step != 1 || static_cast<uint64_t>(d.dim[0].size) < kShort) {
    return write_scattered<E>(law, d, walk, end - begin);
  }
  T* const base = reinterpret_cast<T*>(d.address);
  T values[1024];
  for (uint64_t left = end - begin; left != 0;) {
    uint64_t n = least(left, walk.left_in_row());
    if (d.dim[0].stride != 1) {
      n = least(n, 1024);
      write_span<E, false>(law, d.key, walk.index, values, n);
      T* const to = base + walk.offset;
      for (uint64_t i = 0; i < n; ++i) to[static_cast<int64_t>(i) * d.dim[0].stride] = values[i];
    } else if (stream) {
      write_span<E, true>(law, d.key, walk.index, base + walk.offset, n);
    } else {
      write_span<E, false>(law, d.key, walk.index, base + walk.offset, n);
    }
    walk.advance(n);
    left -= n;
  }
}

// constant, and the zeros and ones of eye_ and dirac_.
template <class T>
void write_known(const KeyedDesc& d, T value, T one, uint64_t begin, uint64_t end) {
  T* const base = reinterpret_cast<T*>(d.address);
  const Diagonal& g = d.diagonal;
  ItemWalk walk(d, begin);
  for (uint64_t left = end - begin; left != 0;) {
    const uint64_t n = least(left, walk.left_in_row());
    T* const to = base + walk.offset;
    const int64_t stride = d.dim[0].stride;
    for (uint64_t i = 0; i < n; ++i) to[static_cast<int64_t>(i) * stride] = value;
    if (d.op == Op::diagonal) {
      const uint64_t step = static_cast<uint64_t>(d.dim[0].step);
      const uint64_t length = static_cast<uint64_t>(g.row_length);
      const uint64_t last = walk.index + (n - 1) * step;
      for (uint64_t row = walk.index / length; row * length <= last; ++row) {
        const int64_t channel = static_cast<int64_t>(row % static_cast<uint64_t>(g.group_rows));
        const uint64_t at = row * length + static_cast<uint64_t>(channel * g.channel + g.centre);
        if (channel >= g.channels || at < walk.index || at > last) continue;
        if ((at - walk.index) % step == 0) {
          to[static_cast<int64_t>((at - walk.index) / step) * stride] = one;
        }
      }
    }
    walk.advance(n);
    left -= n;
  }
}

// For each column a shuffle of the rows of the whole matrix by Fisher and Yates, as far as zeros
// go. Word n of domain 1 is word n % 4 of block n / 4; column c's begin at c * rows.
template <class T>
void write_keyed_mask(const KeyedDesc& d, uint64_t begin, uint64_t end) {
  const Sparse& s = d.sparse;
  T* const base = reinterpret_cast<T*>(d.address);
  const uint64_t rows = static_cast<uint64_t>(s.rows);
  const Scratch<uint32_t> order(rows), word(static_cast<uint64_t>(s.zeros) + 8 * kBlocks);
  for (uint64_t item = begin; item < end; ++item) {
    const uint64_t first = item * rows;
    const uint64_t skipped = first % 4, need = skipped + static_cast<uint64_t>(s.zeros);
    for (uint64_t i = 0; i < need; i += 4 * kBlocks) {
      W w[4];
      const W blocks = count_from((first + i) / 4);
      philox(d.key, blocks, upper(blocks), 1, w);
      U even[kParts], odd[kParts];
      pair(w[0], w[2], even);
      pair(w[1], w[3], odd);
      for (int k = 0; k < kParts; ++k) {
        F low, high;
        zip(view(even[k]), view(odd[k]), low, high);
        store(word.p + i + static_cast<uint64_t>(2 * kLanes * k), bits(low));
        store(word.p + i + static_cast<uint64_t>(2 * kLanes * k + kLanes), bits(high));
      }
    }
    for (uint64_t i = 0; i < rows; ++i) order[i] = static_cast<uint32_t>(i);
    T* const column = base + item;
    for (uint64_t i = 0; i < static_cast<uint64_t>(s.zeros); ++i) {
      const uint64_t j = i + word[skipped + i] % static_cast<uint32_t>(rows - i);
      const uint32_t chosen = order[j];
      order[j] = order[i];
      column[static_cast<int64_t>(chosen) * s.row_stride] = T();
    }
  }
}

template <Dtype dtype>
void keyed_dtype(const KeyedDesc& d, uint64_t begin, uint64_t end, bool stream) {
  using T = typename Element<dtype>::T;
  constexpr bool kDouble = dtype == Dtype::f64;
  switch (d.op) {
    case Op::uniform:
      return write_keyed<dtype, std::conditional_t<kDouble, KeyedUniform64, KeyedUniform>>(
          d, begin, end, stream);
    case Op::normal:
      return write_keyed<dtype, std::conditional_t<kDouble, KeyedNormal64, KeyedNormal>>(
          d, begin, end, stream);
    case Op::trunc_normal:
      return write_keyed<dtype, std::conditional_t<kDouble, KeyedTruncated64, KeyedTruncated>>(
          d, begin, end, stream);
    case Op::sparse_mask:
      return write_keyed_mask<T>(d, begin, end);
    default: {
      T value, one;
      set_element(&value, dtype, d.p[0]);
      set_element(&one, dtype, 1.0);
      return write_known<T>(d, value, one, begin, end);
    }
  }
}

void keyed(const KeyedDesc& d, uint64_t begin, uint64_t end, bool stream) {
  as_dtype(d.dtype,
           [&](auto dtype) { keyed_dtype<decltype(dtype)::value>(d, begin, end, stream); });
  if (stream) fence();
}
