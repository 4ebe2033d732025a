// SPDX-License-Identifier: BSD-3-Clause
// Householder reflectors of stripes of columns: products, and what is found or applied with them.
// Compiled once per target; qr.h says how a matrix lies, qr.inl.h what is done with these.
//
// H_0 ... H_{b-1} = I - V T V' (Schreiber and Van Loan 1989): reflector k is column k of V, v = x -
// beta e_k with beta = -sign(x_k) |x|, not scaled, and T is upper triangular with tau_k = 2 / v'v
// on its diagonal.
//
// All sums have an order that neither the target nor the number of threads changes.

template <class T>
constexpr int kStripe = kStripeBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWide = static_cast<int>(sizeof(Wide<T>) / sizeof(T));

constexpr int64_t kChunk = 32;  // rows that are summed up in a register, from 0

template <class T>
FI_INLINE Wide<T>& at(T* p) {
  return *reinterpret_cast<Wide<T>*>(p);
}
template <class T>
FI_INLINE const Wide<T>& at(const T* p) {
  return *reinterpret_cast<const Wide<T>*>(p);
}

// ---- products of stripes ------------------------------------------------------------------------

// w = v' c: entries (k, j) of all columns k of v and j of c, summed over the rows.
template <class T>
void dot(const T* v, const T* c, int64_t rows, T* w) {
  constexpr int S = kStripe<T>, L = kWide<T>;
  memset(w, 0, sizeof(T) * S * S);
  for (; rows > 0; rows -= kChunk, v += kChunk * S, c += kChunk * S) {
    const int64_t n = rows < kChunk ? rows : kChunk;
    for (int k = 0; k < S; k += kTileRows) {
      for (int j = 0; j < S; j += 2 * L) {
        Wide<T> low[kTileRows] = {}, high[kTileRows] = {};
        for (int64_t i = 0; i < n; ++i) {
          const Wide<T> c0 = at(c + i * S + j), c1 = at(c + i * S + j + L);
          for (int r = 0; r < kTileRows; ++r) {
            const Wide<T> x = wide(v[i * S + k + r]);
            low[r] = mad(x, c0, low[r]);
            high[r] = mad(x, c1, high[r]);
          }
        }
        for (int r = 0; r < kTileRows; ++r) {
          at(w + (k + r) * S + j) += low[r];
          at(w + (k + r) * S + j + L) += high[r];
        }
      }
    }
  }
}

// c += sign a w for a of `depth` columns in stripes that lie `stride` apart. `rows` is a multiple
// of kTileRows. What a stripe adds is summed up before it meets c, whose entries are larger.
template <int kSign, class T>
void add_product(const T* a, int64_t stride, int depth, const T* w, T* c, int64_t rows) {
  constexpr int S = kStripe<T>, L = kWide<T>;
  for (int64_t i = 0; i < rows; i += kTileRows) {
    for (int j = 0; j < S; j += 2 * L) {
      for (int k0 = 0; k0 < depth; k0 += S) {
        Wide<T> low[kTileRows] = {}, high[kTileRows] = {};
        const T* const part = a + k0 / S * stride + i * S;
        const T* const by = w + k0 * S + j;
        const int n = depth - k0 < S ? depth - k0 : S;
        for (int k = 0; k < n; ++k) {
          const Wide<T> w0 = at(by + k * S), w1 = at(by + k * S + L);
          for (int r = 0; r < kTileRows; ++r) {
            const Wide<T> x = wide(part[r * S + k]);
            low[r] = mad(x, w0, low[r]);
            high[r] = mad(x, w1, high[r]);
          }
        }
        for (int r = 0; r < kTileRows; ++r) {
          T* const out = c + (i + r) * S + j;
          at(out) = kSign < 0 ? at(out) - low[r] : at(out) + low[r];
          at(out + L) = kSign < 0 ? at(out + L) - high[r] : at(out + L) + high[r];
        }
      }
    }
  }
}

// ---- the reflectors of one stripe ---------------------------------------------------------------

// T of a stripe, column by column (LAPACK's larft): T[0:c, c] = -tau T[0:c, 0:c] (V' v)[0:c].
template <class T>
struct Columns {
  alignas(64) T t[kStripe<T> * kStripe<T>] = {};  // transposed

  void add(int c, double tau, const T* dots) {
    constexpr int S = kStripe<T>, L = kWide<T>;
    Wide<T> sums[S / L] = {};
    for (int k = 0; k < c; ++k) {
      const Wide<T> x = wide(dots[k]);
      for (int j = 0; j < S / L; ++j) sums[j] = mad(x, at(t + k * S + j * L), sums[j]);
    }
    for (int j = 0; j < S / L; ++j) at(t + c * S + j * L) = sums[j] * wide(static_cast<T>(-tau));
    t[c * S + c] = static_cast<T>(tau);
  }

  void write(T* out) const {
    constexpr int S = kStripe<T>;
    for (int i = 0; i < S; ++i) {
      for (int c = 0; c < S; ++c) out[i * S + c] = t[c * S + i];
    }
  }
};

// A column x of a stripe becomes v; `squares` is |x|^2.
template <class T>
struct Reflector {
  double tau, change;  // v - x at the diagonal
  T sign;              // of R's diagonal

  Reflector(T* diagonal, double squares) {
    const double x = *diagonal;
    const double beta = -std::copysign(std::sqrt(squares), x);
    const T v = static_cast<T>(x - beta);
    const double both = squares - x * x + static_cast<double>(v) * v;
    *diagonal = v;
    change = static_cast<double>(v) - x;
    tau = squares == 0 ? 0 : 2 / both;
    sign = static_cast<T>(squares == 0 ? 0 : beta < 0 ? -1 : 1);
  }
};

// For two vectors of a stripe's columns: rows -= x s, for x the column c; then sums[j] is column
// `next` times column j. kUpdate: false if s is 0 for these columns.
template <bool kUpdate, class T>
void update_and_sum(T* p, int64_t rows, int c, int next, const T* s, int j, T* sums) {
  constexpr int S = kStripe<T>, L = kWide<T>;
  const Wide<T> s0 = at(s + j), s1 = at(s + j + L), s_next = wide(s[next]);
  Wide<T> first = {}, second = {};
  for (; rows > 0; rows -= kChunk, p += kChunk * S) {
    const int64_t n = rows < kChunk ? rows : kChunk;
    Wide<T> low[4] = {}, high[4] = {};
    const auto each = [&](T* row, Wide<T>& a, Wide<T>& b) __attribute__((always_inline)) {
      const Wide<T> x = wide(row[c]), y = nmad(x, s_next, wide(row[next]));
      Wide<T> r0 = at(row + j), r1 = at(row + j + L);
      if (kUpdate) {
        at(row + j) = r0 = nmad(x, s0, r0);
        at(row + j + L) = r1 = nmad(x, s1, r1);
      }
      a = mad(y, r0, a);
      b = mad(y, r1, b);
    };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      for (int r = 0; r < 4; ++r) each(p + (i + r) * S, low[r], high[r]);
    }
    for (int r = 0; i + r < n; ++r) each(p + (i + r) * S, low[r], high[r]);
    first += (low[0] + low[1]) + (low[2] + low[3]);
    second += (high[0] + high[1]) + (high[2] + high[3]);
  }
  at(sums + j) = first;
  at(sums + j + L) = second;
}

// The same for all columns; those that hold `next` come last, as the others read it.
template <class T>
void update_and_sum_all(T* p, int64_t rows, int c, int next, const T* s, T* sums) {
  constexpr int S = kStripe<T>, W = 2 * kWide<T>;
  const int own = next / W * W;
  for (int j = 0; j < own; j += W) update_and_sum<false>(p, rows, c, next, s, j, sums);
  for (int j = own + W; j < S; j += W) update_and_sum<true>(p, rows, c, next, s, j, sums);
  update_and_sum<true>(p, rows, c, next, s, own, sums);
}

// Factors a stripe whose diagonal begins at p: leaves V there, writes T and the signs. For floats
// see factor_in_double.
inline void factor(double* p, int64_t rows, int columns, double* t, double* signs) {
  constexpr int S = kStripe<double>;
  alignas(64) double s[S] = {}, dots[S], sums[S];
  Columns<double> made;
  update_and_sum_all(p, rows, 0, 0, s, sums);
  for (int c = 0; c < columns; ++c) {
    double* const row = p + c * S;
    const Reflector<double> h(row + c, sums[c]);
    signs[c] = h.sign;
    for (int j = 0; j < S; ++j) {  // row c of x became v
      dots[j] = sums[j] + h.change * (j == c ? 0 : row[j]);
      s[j] = j > c ? h.tau * dots[j] : 0;
    }
    made.add(c, h.tau, dots);
    for (int j = c + 1; j < S; ++j) row[j] = 0;  // R is not needed
    if (c + 1 < columns) {
      update_and_sum_all(p + (c + 1) * S, rows - c - 1, c, c + 1, s, sums);
    }
  }
  made.write(t);
}

// The same for a stripe of columns that are taken as they are, with zeros above the diagonal.
template <class T>
void take(T* p, int64_t rows, int columns, T* t, T* signs, T* gram) {
  constexpr int S = kStripe<T>, L = kWide<T>;
  alignas(64) double squares[S] = {};
  for (int64_t i = 0; i < rows; i += kChunk) {
    const int64_t n = rows - i < kChunk ? rows - i : kChunk;
    for (int j = 0; j < S; j += L) {
      Wide<T> sum[4] = {};
      for (int64_t k = 0; k < n; ++k) {
        const Wide<T> x = at(p + (i + k) * S + j);
        sum[k % 4] = mad(x, x, sum[k % 4]);
      }
      const Wide<T> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int l = 0; l < L; ++l) squares[j + l] += static_cast<double>(all[l]);
    }
  }
  double tau[S] = {};
  for (int c = 0; c < columns; ++c) {
    const Reflector<T> h(p + c * S + c, squares[c]);
    signs[c] = h.sign;
    tau[c] = h.tau;
  }
  dot(p, p, rows, gram);
  Columns<T> made;
  for (int c = 0; c < columns; ++c) made.add(c, tau[c], gram + c * S);
  made.write(t);
}

// ---- blocks of stripes --------------------------------------------------------------------------

// Stripes side by side whose reflectors are applied together; v: at the row of their diagonal.
template <class T>
struct StripeBlock {
  static constexpr int S = kStripe<T>;
  T* v;
  int64_t stride;  // from stripe to stripe
  T* t;            // in stripes of `width` rows
  int64_t width;
  int64_t rows;  // of v, a multiple of all tiles
  int columns;   // in all stripes
  T* scratch;    // three times width rows of a stripe

  T* w() const { return scratch; }
  T* tw() const { return scratch + width * S; }
  T* gram() const { return scratch + 2 * width * S; }

  void project(const T* c) const {  // w = V' c
    for (int q = 0; q * S < columns; ++q) {
      dot(v + q * stride + int64_t{q} * S * S, c + int64_t{q} * S * S, rows - q * S,
          w() + q * S * S);
    }
  }
  void reflect(T* c) const { add_product<-1>(v, stride, columns, tw(), c, rows); }  // c -= V tw

  void apply_transposed(T* c) const {  // (I - V T' V') c
    project(c);
    for (int q = 0; q * S < columns; ++q)
      dot(t + q * width * S, w(), (q + 1) * S, tw() + q * S * S);
    reflect(c);
  }

  // (I - V T V') of what is in w = V' c.
  void apply_projected(T* c) const {
    const int filled = (columns + S - 1) / S * S;
    memset(tw(), 0, sizeof(T) * static_cast<size_t>(filled) * S);
    add_product<1>(t, width * S, columns, w(), tw(), filled);
    reflect(c);
  }

  // After the reflectors of the first q stripes, those of another; `of_it` is its own T.
  void append(int q, const T* of_it) {
    T* const column = t + q * width * S;
    memset(column, 0, sizeof(T) * static_cast<size_t>(width) * S);
    memcpy(column + q * S * S, of_it, sizeof(T) * S * S);
    const int64_t above = int64_t{q} * S;
    for (int p = 0; p < q; ++p) {
      dot(v + p * stride + above * S, v + q * stride + above * S, rows - above, w() + p * S * S);
    }
    memset(tw(), 0, sizeof(T) * static_cast<size_t>(above) * S);
    add_product<1>(w(), 0, S, of_it, tw(), above);
    add_product<-1>(t, width * S, static_cast<int>(above), tw(), column, above);
  }
};

// As many elements as a stripe of doubles has columns.
FI_INLINE void widen(const float* __restrict__ from, double* __restrict__ to) {
  for (int i = 0; i < kStripe<double>; ++i) to[i] = static_cast<double>(from[i]);
}
FI_INLINE void narrow(const double* __restrict__ from, const double* scale,
                      float* __restrict__ to) {
  for (int i = 0; i < kStripe<double>; ++i) to[i] = static_cast<float>(from[i] * scale[i]);
}

// Factors a stripe of floats in double: sums of rounding errors in its columns, which become
// reflectors for all the others, would be half of the error of the whole. `work`: see Shape.
inline void factor_in_double(float* p, int64_t rows, int columns, float* t, float* signs,
                             double* work) {
  constexpr int S = kStripe<double>, kParts = kStripe<float> / S, kAll = S * kParts;
  const int64_t padded = (rows + 7) / 8 * 8, stride = padded * S;
  double* const made = work + kParts * stride;
  StripeBlock<double> block{work, stride, made, kAll, padded, 0, made + kAll * kAll};
  for (int q = 0; q < kParts; ++q) {
    double* const to = work + q * stride;
    for (int64_t i = 0; i < rows; ++i) widen(p + i * kAll + q * S, to + i * S);
    memset(to + rows * S, 0, sizeof(double) * static_cast<size_t>(padded - rows) * S);
  }
  double sign[kAll] = {};
  alignas(64) double own[S * S];
  for (int q = 0; q * S < columns; ++q) {
    double* const c = work + q * stride;
    if (q != 0) block.apply_transposed(c);
    factor(c + q * S * S, rows - q * S, std::min(S, columns - q * S), own, sign + q * S);
    memset(c, 0, sizeof(double) * static_cast<size_t>(q * S) * S);
    block.append(q, own);
    block.columns = std::min(columns, (q + 1) * S);
  }
  // Scaled to tau = 1, so that floats can hold V and T of a matrix of any scale.
  double scale[kAll] = {}, inverse[kAll] = {};
  for (int i = 0; i < columns; ++i) {
    scale[i] = std::sqrt(made[(i / S * kAll + i) * S + i % S]);
    inverse[i] = scale[i] == 0 ? 0 : 1 / scale[i];
  }
  memset(t, 0, sizeof(float) * kAll * kAll);
  for (int q = 0; q * S < columns; ++q) {
    const double* const v = work + q * stride;
    for (int64_t i = 0; i < rows; ++i) narrow(v + i * S, scale + q * S, p + i * kAll + q * S);
    for (int i = 0; i < columns; ++i) {
      double* const row = made + (q * kAll + i) * S;
      for (int j = 0; j < S; ++j) row[j] *= inverse[i];
      narrow(row, inverse + q * S, t + i * kAll + q * S);
    }
  }
  for (int i = 0; i < columns; ++i) signs[i] = static_cast<float>(sign[i]);
}
