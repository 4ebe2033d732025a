// SPDX-License-Identifier: BSD-3-Clause
// Orthogonal factors of Gaussian matrices. Compiled once per target.
//
// Blocks of reflectors are found and applied to what lies to their right; then they are applied to
// the identity, last block first, where it is not zero any more: 8/3 n^3 operations for m = n. With
// the columns' signs that is *the* factor whose R has a positive diagonal.
//
// `direct` (Stewart 1980): the columns of the lower trapezoid of a Gaussian matrix are the x, with
// which the factor is uniform by the Haar measure, and nothing has to be factored. `gaussian` is
// then packed: row i holds its first min(i + 1, n) entries.

// Computed in T, from a Gaussian matrix of In.
template <class T, class In>
class MatrixWork {
 public:
  static constexpr int S = kStripe<T>;

  MatrixWork(const QrDesc& d, T* work, Team& team, int worker)
      : d_(d), shape_(d), work_(work), team_(team), worker_(worker) {}

  bool orthonormalize() {
    if (shape_.n == 1) {
      if (worker_ == 0)
        as_dtype(d_.dtype, [&](auto dtype) { write_column<decltype(dtype)::value>(); });
      return true;
    }
    read();
    if (!team_.barrier()) return false;
    return (d_.direct ? take_all() : factor_all()) && form() && write();
  }

 private:
  static constexpr int64_t kRows = 4096;  // of a piece of loading and storing

  T* stripe(int64_t s, int64_t row) const { return work_ + s * shape_.stripe_items() + row * S; }
  int64_t first(int64_t b) const { return b * shape_.per_block; }  // stripe of block b
  int64_t last(int64_t b) const { return std::min(shape_.stripes, first(b + 1)); }
  int columns(int64_t s) const { return static_cast<int>(std::min<int64_t>(S, shape_.n - s * S)); }

  StripeBlock<T> block(int64_t b, bool copied) const {
    const int64_t row = first(b) * S;
    const int64_t columns = std::min(shape_.n, last(b) * S) - row;
    return {copied ? work_ + shape_.copy_at() : stripe(first(b), row),
            shape_.stripe_items(),
            work_ + shape_.t_at() + b * shape_.t_items(),
            shape_.width(),
            shape_.padded - row,
            static_cast<int>(columns),
            work_ + shape_.scratch_at(worker_)};
  }

  // The reflectors of the block's stripe q, by factoring it or as they are.
  void reflectors(StripeBlock<T>& own, int64_t b, int64_t s) {
    const int q = static_cast<int>(s - first(b));
    const int64_t above = int64_t{q} * S;
    T* const c = stripe(s, first(b) * S);
    T* const signs = work_ + shape_.signs_at() + s * S;
    alignas(64) T t[S * S];
    if (d_.direct) {
      take(c + above * S, own.rows - above, columns(s), t, signs, own.gram());
    } else {
      if (q != 0) {
        StripeBlock<T> before = own;
        before.columns = static_cast<int>(above);
        before.apply_transposed(c);
      }
      find(c + above * S, shape_.m - s * S, columns(s), t, signs);
      memset(c, 0, sizeof(T) * static_cast<size_t>(above) * S);
    }
    own.append(q, t);
  }

  void find(float* c, int64_t rows, int columns, float* t, float* signs) {
    factor_in_double(c, rows, columns, t, signs,
                     reinterpret_cast<double*>(work_ + shape_.panel_at()));
  }
  void find(double* c, int64_t rows, int columns, double* t, double* signs) {
    factor(c, rows, columns, t, signs);
  }

  void find_block(int64_t b) {
    StripeBlock<T> own = block(b, false);
    for (int64_t s = first(b); s < last(b); ++s) reflectors(own, b, s);
  }

  bool factor_all() {
    if (worker_ == 0) find_block(0);
    if (!team_.barrier()) return false;
    for (int64_t b = 0; b + 1 < shape_.blocks; ++b) {
      const StripeBlock<T> own = block(b, false);
      const auto apply = [&](int64_t s) { own.apply_transposed(stripe(s, first(b) * S)); };
      if (worker_ == 0) {  // while the others are at what lies behind it
        for (int64_t s = first(b + 1); s < last(b + 1); ++s) apply(s);
        find_block(b + 1);
      }
      for (int64_t s; (s = last(b + 1) + team_.claim()) < shape_.stripes;) apply(s);
      if (!team_.barrier()) return false;
    }
    return true;
  }

  bool take_all() {
    for (int64_t b; (b = team_.claim()) < shape_.blocks;) find_block(b);
    return team_.barrier();
  }

  // Overwrites the reflectors by the factor, last block first.
  bool form() {
    for (int64_t b = shape_.blocks - 1; b >= 0; --b) {
      const StripeBlock<T> own = block(b, true);
      const int64_t row = first(b) * S, from = first(b), count = last(b) - from;
      const size_t top = sizeof(T) * S * static_cast<size_t>(std::min(count * S, own.rows));
      for (int64_t q; (q = team_.claim()) < count;) {
        memcpy(own.v + q * own.stride, stripe(from + q, row), sizeof(T) * S * own.rows);
      }
      if (!team_.barrier()) return false;
      for (int64_t q; (q = team_.claim()) < shape_.stripes - from;) {
        T* const c = stripe(from + q, row);
        if (q < count) {
          form_own(own, b, q, c);
        } else {  // its upper rows are still zero
          memset(c, 0, top);
          own.project(c);
          own.apply_projected(c);
        }
      }
      if (!team_.barrier()) return false;
    }
    return true;
  }

  // Columns of the identity, reflected: V' of them are rows of V. What the last stripe has beyond
  // the matrix comes from what follows in the workspace, and stays in columns that nobody reads.
  void form_own(const StripeBlock<T>& own, int64_t b, int64_t q, T* c) const {
    const int n = columns(first(b) + q);
    for (int k0 = 0; k0 < own.columns; k0 += S) {
      const T* const rows = own.v + k0 / S * own.stride + q * S * S;
      for (int k = 0; k < S; ++k) {
        for (int j = 0; j < S; ++j) own.w()[(k0 + k) * S + j] = rows[j * S + k];
      }
    }
    memset(c, 0, sizeof(T) * S * static_cast<size_t>(own.rows));
    for (int j = 0; j < n; ++j) c[(q * S + j) * S + j] = 1;
    own.apply_projected(c);
  }

  // ---- in and out ----

  template <class Body>
  void each_piece(const Body& body) {
    const int64_t pieces = (shape_.padded + kRows - 1) / kRows;
    for (int64_t i; (i = team_.claim()) < pieces * shape_.stripes;) {
      const int64_t row = i % pieces * kRows;
      body(i / pieces, row, std::min(shape_.padded, row + kRows));
    }
  }

  void read() {
    const In* const from = reinterpret_cast<const In*>(d_.gaussian);
    const int64_t m = shape_.m, n = shape_.n;
    each_piece([&](int64_t s, int64_t begin, int64_t end) {
      const int64_t stop = std::min(end, m), left = s * S;
      const int64_t width = columns(s);
      memset(stripe(s, begin), 0, sizeof(T) * S * static_cast<size_t>(end - begin));
      if (d_.direct) {
        for (int64_t i = std::max(begin, left); i < stop; ++i) {
          const int64_t row = i < n ? i * (i + 1) / 2 : n * (n + 1) / 2 + (i - n) * n;
          copy(from + row + left, stripe(s, i), std::min(width, i + 1 - left));
        }
      } else if (d_.rows >= d_.cols) {
        for (int64_t i = begin; i < stop; ++i) copy(from + i * n + left, stripe(s, i), width);
      } else {
        for (int64_t i = begin; i < stop; i += 16) {
          const int64_t items = std::min<int64_t>(16, stop - i);
          for (int64_t j = 0; j < width; ++j) {
            const In* const column = from + (left + j) * m + i;
            for (int64_t k = 0; k < items; ++k) stripe(s, i + k)[j] = static_cast<T>(column[k]);
          }
        }
      }
    });
  }

  static void copy(const In* __restrict__ from, T* __restrict__ to, int64_t items) {
    if (items == S) {  // known to the compiler
      for (int i = 0; i < S; ++i) to[i] = static_cast<T>(from[i]);
      return;
    }
    for (int64_t i = 0; i < items; ++i) to[i] = static_cast<T>(from[i]);
  }

  bool write() {
    as_dtype(d_.dtype, [&](auto dtype) { write_as<decltype(dtype)::value>(); });
    return team_.barrier();
  }

  // One column, x / |x|, needs neither stripes nor others to help.
  template <Dtype dtype>
  void write_column() {
    const In* const x = reinterpret_cast<const In*>(d_.gaussian);
    using E = typename Element<dtype>::T;
    double sums[8] = {};
    for (int64_t i = 0; i < shape_.m; ++i) sums[i % 8] += static_cast<double>(x[i]) * x[i];
    const double norm = std::sqrt(((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                                  ((sums[4] + sums[5]) + (sums[6] + sums[7])));
    const In gain = static_cast<In>(d_.gain);
    for (int64_t i = 0; i < shape_.m; i += 32) {
      const int items = static_cast<int>(std::min<int64_t>(32, shape_.m - i));
      In row[32];
      for (int j = 0; j < items; ++j) {
        row[j] = norm == 0 ? In() : static_cast<In>(static_cast<double>(x[i + j]) / norm);
        row[j] *= gain;
      }
      put_row<dtype>(row, reinterpret_cast<E*>(d_.out) + i, items);
    }
  }

  template <Dtype dtype>
  void write_as() {
    const int64_t m = shape_.m, n = shape_.n;
    using E = typename Element<dtype>::T;
    E* const out = reinterpret_cast<E*>(d_.out);
    each_piece([&](int64_t s, int64_t begin, int64_t end) {
      const int width = columns(s);
      const In gain = static_cast<In>(d_.gain);
      const T* const signs = work_ + shape_.signs_at() + s * S;
      In rows[S][S];
      for (int64_t i = begin; i < std::min(end, m); i += S) {
        const int count = static_cast<int>(std::min<int64_t>(S, std::min(end, m) - i));
        const bool tall = d_.rows >= d_.cols;
        for (int k = 0; k < count; ++k) {
          const T* const row = stripe(s, i + k);
          // Columns beyond the matrix have no signs; they are not written either.
          for (int j = 0; j < S; ++j) rows[k][j] = static_cast<In>(row[j] * signs[j]) * gain;
        }
        if (tall) {
          for (int k = 0; k < count; ++k) put_row<dtype>(rows[k], out + (i + k) * n + s * S, width);
        } else {
          for (int k = 0; k < S; ++k) {
            for (int j = 0; j < k; ++j) std::swap(rows[k][j], rows[j][k]);
          }
          for (int j = 0; j < width; ++j) put_row<dtype>(rows[j], out + (s * S + j) * m + i, count);
        }
      }
    });
  }

  template <Dtype dtype, class E>
  static void put_row(const In* row, E* out, int items) {
    if constexpr (dtype == Dtype::f64 || dtype == Dtype::f32) {
      memcpy(out, row, sizeof(E) * static_cast<size_t>(items));
    } else {
      using To = Element<dtype>;
      float values[2 * kPairs];
      E coded[2 * kPairs];
      for (int i = 0; i < items; i += 2 * kPairs) {
        const int n = std::min(items - i, 2 * kPairs);
        for (int j = 0; j < 2 * kPairs; ++j) values[j] = j < n ? static_cast<float>(row[i + j]) : 0;
        for (int j = 0; j < kPairs; j += kLanes) {
          uint32_t low[kLanes], high[kLanes];
          memcpy(low, values + j, sizeof low);
          memcpy(high, values + j + kPairs, sizeof high);
          To::template store<false>(coded + j, To::coded(view(load(low))),
                                    To::coded(view(load(high))));
        }
        memcpy(out + i, coded, sizeof(E) * static_cast<size_t>(n));
      }
    }
  }

  const QrDesc& d_;
  const Shape shape_;
  T* const work_;
  Team& team_;
  const int worker_;
};

// Member of a team that writes one matrix. False: abandoned.
bool qr(const QrDesc& d, void* work, Team& team, int worker) {
  double* const doubles = static_cast<double*>(work);
  if (d.dtype == Dtype::f64)
    return MatrixWork<double, double>(d, doubles, team, worker).orthonormalize();
  if (is_wide(d)) return MatrixWork<double, float>(d, doubles, team, worker).orthonormalize();
  return MatrixWork<float, float>(d, static_cast<float*>(work), team, worker).orthonormalize();
}
