// SPDX-License-Identifier: BSD-3-Clause
// Loops over the items of one fill. Compiled once per target.

// Writes `count` elements from element `first` of a strided tensor, innermost dimension fastest.
template <class T>
void scatter(const FillDesc& d, uint64_t first, const T* values, uint64_t count) {
  T* const base = reinterpret_cast<T*>(d.address);
  const Strided& s = d.strided;
  int64_t index[4] = {};
  for (int k = 0; k < d.rank; ++k) {
    index[k] = static_cast<int64_t>(first % static_cast<uint64_t>(s.size[k]));
    first /= static_cast<uint64_t>(s.size[k]);
  }
  while (count != 0) {
    int64_t offset = 0;
    for (int k = 0; k < d.rank; ++k) offset += index[k] * s.stride[k];
    const uint64_t left = static_cast<uint64_t>(s.size[0] - index[0]);
    const uint64_t run = count < left ? count : left;
    for (uint64_t i = 0; i < run; ++i)
      base[offset + static_cast<int64_t>(i) * s.stride[0]] = values[i];
    values += run;
    count -= run;
    index[0] = 0;
    for (int k = 1; k < d.rank && ++index[k] == s.size[k]; ++k) index[k] = 0;
  }
}

// Fewer items than a step writes, from as many words as they take.
template <class Law>
void write_rest(const Law& law, Words& w, typename Law::T* out, uint64_t items) {
  uint32_t raw[Law::kStepWords + Words::kPad] = {};
  typename Law::T values[Law::kItems];
  take_raw(w, raw, static_cast<uint32_t>(items * Law::kStepWords / Law::kItems));
  law.template write<false>(raw, values);
  memcpy(out, values, items * sizeof *out);
}

template <class Law, bool kStream>
void write_run(const Law& law, Words& w, typename Law::T* out, uint64_t items) {
  each_step<Law::kStepWords>(w, items / Law::kItems,
                             [&](const uint32_t* x) __attribute__((always_inline)) {
                               law.template write<kStream>(x, out);
                               out += Law::kItems;
                             });
  if (items % Law::kItems != 0) write_rest(law, w, out, items % Law::kItems);
}

// Items [begin, end) of a law that is the same for every item.
template <class Law>
void write_items(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t end,
                 bool stream) {
  using T = typename Law::T;
  if (d.rank == 0) {
    T* out = reinterpret_cast<T*>(d.address) + begin;
    stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    if (stream) {
      write_run<Law, true>(law, w, out, end - begin);
    } else {
      write_run<Law, false>(law, w, out, end - begin);
    }
    return;
  }
  T values[1024];
  for (uint64_t i = begin; i < end; i += 1024) {
    const uint64_t n = end - i < 1024 ? end - i : 1024;
    write_run<Law, false>(law, w, values, n);
    scatter(d, i, values, n);
  }
}

template <Dtype dtype, bool kContract>
void write_uniform(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, bool stream) {
  if (!(d.flavour & kKeepsEnd) && reaches_end<dtype, kContract>(d)) {
    write_items(Uniform<dtype, kContract, true>(d), d, w, begin, end, stream);
  } else {
    write_items(Uniform<dtype, kContract, false>(d), d, w, begin, end, stream);
  }
}

// normal_: full groups of 16; if some elements are left over, the last 16 are drawn again. float
// and double draw words for the leftover elements first, the 16-bit types do not.
template <class Law>
void write_normal(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t end,
                  bool stream) {
  using T = typename Law::T;
  constexpr uint64_t kPerItem = Law::kStepWords / Law::kItems;
  const uint64_t whole = d.items / 16 * 16;
  write_items(law, d, w, begin, end < whole ? end : whole, stream);
  if (end != d.items || whole == d.items) return;
  const uint64_t leftover = sizeof(T) == 2 ? 0 : d.items - whole;
  skip(w, w.position() + leftover * kPerItem);
  write_rest(law, w, reinterpret_cast<T*>(d.address) + d.items - 16, 16);
}

template <bool kStream>
void write_pattern(char* out, U pattern, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i += sizeof(U)) put<kStream>(out + i, pattern);
}

// The same value everywhere.
template <class T>
void write_constant(const FillDesc& d, T value, uint64_t begin, uint64_t end, bool stream) {
  alignas(64) T tile[1024];
  for (int i = 0; i < 1024; ++i) tile[i] = value;
  if (d.rank != 0) {
    for (uint64_t i = begin; i < end; i += 1024) {
      scatter(d, i, tile, end - i < 1024 ? end - i : 1024);
    }
    return;
  }
  T* out = reinterpret_cast<T*>(d.address) + begin;
  uint64_t n = end - begin;
  if (sizeof(U) >= sizeof(T)) {
    for (; n != 0 && reinterpret_cast<uintptr_t>(out) % sizeof(U) != 0; --n) *out++ = value;
    const uint64_t whole = n * sizeof(T) / sizeof(U) * sizeof(U) / sizeof(T);
    uint32_t lanes[kLanes];
    memcpy(lanes, tile, sizeof lanes);
    const U pattern = load(lanes);
    if (stream) {
      write_pattern<true>(reinterpret_cast<char*>(out), pattern, whole * sizeof(T));
    } else {
      write_pattern<false>(reinterpret_cast<char*>(out), pattern, whole * sizeof(T));
    }
    out += whole;
    n -= whole;
  }
  for (; n != 0; --n) *out++ = value;
}

// eye_ and dirac_: zeros, then the ones that fall into [begin, end).
template <class T>
void write_diagonal(const FillDesc& d, T one, uint64_t begin, uint64_t end, bool stream) {
  write_constant<T>(d, T(), begin, end, stream);
  T* const out = reinterpret_cast<T*>(d.address);
  const Diagonal& g = d.diagonal;
  const uint64_t row_length = static_cast<uint64_t>(g.row_length);
  for (uint64_t row = begin / row_length; row * row_length < end; ++row) {
    const int64_t channel = static_cast<int64_t>(row % static_cast<uint64_t>(g.group_rows));
    if (channel >= g.channels) continue;
    const uint64_t at = row * row_length + static_cast<uint64_t>(channel * g.channel + g.centre);
    if (at >= begin && at < end) out[at] = one;
  }
}

// normal_ on fewer than 16 or on non-contiguous elements: double Box-Muller, one pair from four
// words. `cached` is the sine a former call left over; the first item takes it if d.hi != 0.
template <class T, bool kContract>
void write_pairs(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, double* cached) {
  constexpr uint32_t kChunk = 256;
  T values[kChunk];
  uint32_t raw[4 + Words::kPad] = {}, word[4 + Words::kPad];
  double cosine = 0, sine = *cached;
  bool have_sine = begin == 0 && d.hi != 0;
  if (begin != 0 && (begin - (d.hi != 0)) % 2 != 0) {  // in the middle of a pair
    take_raw(w, raw, 4);
    temper_all(raw, word, 4);
    normal_pair(word, cosine, sine);
    have_sine = true;
  }
  for (uint64_t i = begin; i < end; i += kChunk) {
    const uint64_t n = end - i < kChunk ? end - i : kChunk;
    for (uint64_t j = 0; j < n; ++j) {
      double z = sine;
      if (!have_sine) {
        take_raw(w, raw, 4);
        temper_all(raw, word, 4);
        normal_pair(word, cosine, sine);
        z = cosine;
      }
      have_sine = !have_sine;
      set_element(values + j, d.dtype, kContract ? std::fma(z, d.b, d.a) : z * d.b + d.a);
    }
    scatter(d, i, values, n);
  }
  if (end == d.items && have_sine) *cached = sine;
}

// sparse_: for each column the first `zeros` entries of torch.randperm(rows) become zero. That is a
// Fisher-Yates shuffle, step i swapping entries i and i + word % (rows - i). An entry is never read
// again after its step, so one assignment does for the swap, and what is left behind the last step
// are the rows that stay.
template <class Bits>
void write_sparse_mask(const FillDesc& d, Words& w, uint64_t begin, uint64_t end) {
  const uint32_t rows = static_cast<uint32_t>(d.sparse.rows);
  const uint32_t zeros = static_cast<uint32_t>(d.sparse.zeros);
  const uint32_t steps = zeros < rows ? zeros : rows - 1;
  Bits* const base = reinterpret_cast<Bits*>(d.address);
  constexpr uint32_t kBatch = 256;
  const Scratch<uint32_t> order(rows), inverse(rows);
  // Columns are done in blocks: a row of a block is what one pass over the memory touches at a
  // time.
  const uint64_t block = rows <= 8192 ? 256 : 64, row_words = block / 32;
  const Scratch<uint32_t> stays(rows * row_words);  // a bit per column
  for (uint32_t i = 0; i < steps; ++i) {
    inverse[i] = static_cast<uint32_t>((uint64_t{1} << 32) / (rows - i));
  }
  for (uint64_t column = begin; column < end; column += block) {
    const uint64_t n = end - column < block ? end - column : block;
    for (uint64_t c = 0; c < n; ++c) {
      const uint64_t after = w.position() + rows - 1;
      for (uint32_t i = 0; i < rows; ++i) order[i] = i;
      for (uint32_t i = 0; i < steps; i += kBatch) {
        uint32_t raw[kBatch + Words::kPad], word[kBatch + Words::kPad];
        const uint32_t k = steps - i < kBatch ? steps - i : kBatch;
        take_raw(w, raw, k);
        temper_all(raw, word, k);
        for (uint32_t j = 0; j < k; ++j) {  // remainders: the quotient is right or one too small
          const uint32_t m = rows - i - j;
          const uint32_t q = static_cast<uint32_t>(uint64_t{word[j]} * inverse[i + j] >> 32);
          const uint32_t r = word[j] - q * m;
          word[j] = i + j + (r < r - m ? r : r - m);
        }
        for (uint32_t j = 0; j < k; ++j) order[word[j]] = order[i + j];
      }
      if (zeros < rows) {
        uint32_t* const word = stays.p + c / 32;
        for (uint32_t i = steps; i < rows; ++i) word[order[i] * row_words] |= 1u << c % 32;
      }
      skip(w, after);
    }
    for (uint32_t row = 0; row < rows; ++row) {
      Bits* out =
          base + static_cast<int64_t>(row) * d.sparse.row_stride + static_cast<int64_t>(column);
      for (uint64_t i = 0; i < n; i += 32) {
        uint32_t& stay = stays[row * row_words + i / 32];
        const uint32_t width = n - i < 32 ? static_cast<uint32_t>(n - i) : 32;
        for (uint32_t c = 0; c < width; ++c) {
          out[i + c] &= static_cast<Bits>(Bits{0} - static_cast<Bits>(stay >> c & 1));
        }
        stay = 0;
      }
    }
  }
}

// The one place where op, dtype and flavour become code.
template <Dtype dtype>
void fill_dtype(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, bool stream,
                double* cached) {
  using T = typename Element<dtype>::T;
  constexpr bool kDouble = dtype == Dtype::f64;
  using Bits =
      std::conditional_t<kDouble, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, T>>;
  constexpr Dtype single = kDouble ? Dtype::f32 : dtype;  // names a law that is not instantiated
  const bool contract = d.flavour & kContracted;
  switch (d.op) {
    case Op::constant: {
      T value;
      set_element(&value, dtype, d.a);
      return write_constant<T>(d, value, begin, end, stream);
    }
    case Op::diagonal: {
      T one;
      set_element(&one, dtype, 1.0);
      return write_diagonal<T>(d, one, begin, end, stream);
    }
    case Op::uniform:
      if constexpr (kDouble) {
        if (contract) return write_items(UniformDouble<true>(d), d, w, begin, end, stream);
        return write_items(UniformDouble<false>(d), d, w, begin, end, stream);
      } else {
        if (contract) return write_uniform<single, true>(d, w, begin, end, stream);
        return write_uniform<single, false>(d, w, begin, end, stream);
      }
    case Op::normal:
      if constexpr (kDouble) {
        return write_normal(NormalLibm<dtype, double>(d), d, w, begin, end, stream);
      } else {
        if (d.flavour & kCephes) return write_normal(Normal<dtype>(d), d, w, begin, end, stream);
        return write_normal(NormalLibm<dtype, float>(d), d, w, begin, end, stream);
      }
    case Op::normal_pairs:
      if (contract) return write_pairs<T, true>(d, w, begin, end, cached);
      return write_pairs<T, false>(d, w, begin, end, cached);
    case Op::sparse_mask:
      return write_sparse_mask<Bits>(d, w, begin, end);
    case Op::trunc_normal:  // run_trunc
    case Op::trunc_erfinv:  // nobody asks a CPU for it
      return;
  }
}

void fill(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, bool stream, double* cached) {
  as_dtype(d.dtype, [&](auto dtype) {
    fill_dtype<decltype(dtype)::value>(d, w, begin, end, stream, cached);
  });
  if (stream) fence();
}
