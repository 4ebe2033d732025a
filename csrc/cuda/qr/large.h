// SPDX-License-Identifier: BSD-3-Clause
// Steps for matrices of one shape that lie in working memory, column by column; the matrix products
// between them are the host's. The reflectors of some columns are I - V T V', T upper triangular,
// where T^-1 is V'V above the diagonal and 1 / tau on it.
#pragma once

#include "small.h"

namespace fastinit {
namespace cuda {

constexpr uint32_t kGramPitch = kMostPanel + 1;

template <class T>
FI_FN Matrix<T> working_matrix(const QrArguments& args, uint32_t number) {
  const uint64_t size = uint64_t{args.n} * args.pitch;
  return {global<T>(args.columns) + number * size, args.m, args.n, args.pitch};
}

// A tile of a matrix on its way through shared memory.
template <class T>
struct Tile {
  T (*const cells)[kQrTile + 1];  // the odd pitch keeps columns on different banks
  const Matrix<T> a;
  uint32_t i, j;        // where it starts
  const uint32_t step;  // rows or columns that the threads of a block move at a time

  FI_FN Tile(const Block& block, const QrArguments& args, uint32_t number, uint32_t tile,
             void* shared)
      : cells(static_cast<T (*)[kQrTile + 1]>(shared)),
        a(working_matrix<T>(args, number)),
        step(block.threads() / kQrTile) {
    const uint32_t down = (a.m + kQrTile - 1) / kQrTile;
    j = tile / down * kQrTile;
    i = tile % down * kQrTile;
  }
  FI_FN bool has(uint32_t di, uint32_t dj) const { return i + di < a.m && j + dj < a.n; }
};

// Gaussian numbers to columns, zeros above the diagonal if they are packed.
template <class T>
FI_FN void pack(const Block& block, const QrArguments& args, uint32_t number, uint32_t tile_number,
                void* shared) {
  const Tile<T> tile(block, args, number, tile_number, shared);
  const QrJob& job = job_of(args, number);
  const bool direct = args.direct != 0, by_columns = job.rows < job.cols && !direct;
  block.each([&](uint32_t t) {
    const T* const from = global<const T>(job.from);
    const uint32_t x = t % kQrTile;
    for (uint32_t y = t / kQrTile; y < kQrTile; y += tile.step) {
      const uint32_t di = by_columns ? x : y, dj = by_columns ? y : x;
      if (!tile.has(di, dj)) continue;
      const uint32_t i = tile.i + di, j = tile.j + dj;
      T value = 0;
      if (!direct || i >= j) value = from[place(job, direct, i, j)];
      tile.cells[di][dj] = value;
    }
  });
  block.each([&](uint32_t t) {
    const uint32_t di = t % kQrTile;
    for (uint32_t dj = t / kQrTile; dj < kQrTile; dj += tile.step) {
      if (tile.has(di, dj)) tile.a.at(tile.i + di, tile.j + dj) = tile.cells[di][dj];
    }
  });
}

// Columns to the result: sign, gain, transposition, rounding.
template <class T>
FI_FN void write(const Block& block, const QrArguments& args, uint32_t number, uint32_t tile_number,
                 void* shared) {
  const Tile<T> tile(block, args, number, tile_number, shared);
  const QrJob& job = job_of(args, number);
  const bool wide = job.rows < job.cols;
  block.each([&](uint32_t t) {
    const T* const sign = global<const T>(args.sign) + uint64_t{number} * tile.a.n;
    const T gain = static_cast<T>(job.gain);
    const uint32_t di = t % kQrTile;
    for (uint32_t dj = t / kQrTile; dj < kQrTile; dj += tile.step) {
      if (!tile.has(di, dj)) continue;
      const uint32_t i = tile.i + di, j = tile.j + dj;
      tile.cells[di][dj] = mul(mul(tile.a.at(i, j), sign[j]), gain);
    }
  });
  block.each([&](uint32_t t) {
    const uint32_t x = t % kQrTile;
    for (uint32_t y = t / kQrTile; y < kQrTile; y += tile.step) {
      const uint32_t di = wide ? x : y, dj = wide ? y : x;
      if (!tile.has(di, dj)) continue;
      store_result(job, place(job, false, tile.i + di, tile.j + dj), tile.cells[di][dj]);
    }
  });
}

// Lengths and heads of the columns of a packed matrix, one for each warp.
template <class T>
FI_FN void reflect_columns(const Block& block, const QrArguments& args, uint32_t number,
                           uint32_t part) {
  const Matrix<T> a = working_matrix<T>(args, number);
  const uint64_t scalars = uint64_t{number} * a.n;
  reflect(block, a, part * (block.threads() / kWarp), [&](uint32_t j, T tau, T beta, T) {
    global<T>(args.tau)[scalars + j] = tau;
    global<T>(args.sign)[scalars + j] = sign_of(beta);
  });
}

// T from V'V above the diagonal of `t`, in its place. Row i of an inverse needs nothing but itself:
// thread i finds it alone, and keeps it below the diagonal, as column i. Sums are
// double: with float's, Q was 5 % farther from orthogonal.
template <class T>
FI_FN void invert(const Block& block, T* triangle, uint32_t pitch, uint32_t n, const T* tau) {
  block.each([&](uint32_t t) {
    if (t < n) triangle[t * pitch + t] = tau[t];
  });
  block.each([&](uint32_t t) {
    if (t >= n) return;
    for (uint32_t j = t + 1; j < n; ++j) {
      double sum = 0;
      for (uint32_t l = t - t % kWarp; l < j; ++l) {  // together in a warp, whatever is its own
        const double mine = l < t ? T(0) : triangle[l * pitch + t];
        const double next = triangle[l * pitch + j];
        sum = fma(mine, next, sum);
      }
      triangle[j * pitch + t] = -mul(tau[j], static_cast<T>(sum));
    }
  });
}

// What `invert` left, as a dense matrix with zeros below the diagonal.
template <class T>
FI_FN void write_triangle(const Block& block, const T* triangle, uint32_t pitch, uint32_t n,
                          T* to) {
  block.each([&](uint32_t t) {
    for (uint32_t e = t; e < n * n; e += block.threads()) {
      const uint32_t i = e / n, j = e - i * n;
      to[e] = j < i ? T(0) : triangle[j * pitch + i];
    }
  });
}

// Reflectors of the panel of columns [first, first + width) and rows from `first` on, and their T.
// `shared`: of QrState<T>, kMostPanel rows of V'V and, unless it streams, the panel.
template <class T, bool streams>
FI_FN void factor_panel(const Block& block, const QrArguments& args, uint32_t number,
                        void* shared) {
  constexpr uint32_t kLanes = 32, kOwn = 4;
  QrState<T>* const s = static_cast<QrState<T>*>(shared);
  T* const gram = reinterpret_cast<T*>(s + 1);
  const Matrix<T> all = working_matrix<T>(args, number);
  const uint32_t m = args.m - args.first, n = args.width;
  T* const from = &all.at(args.first, args.first);
  Matrix<T> a = {from, m, n, args.pitch};
  if constexpr (!streams) {
    a.a = gram + kMostPanel * kGramPitch;
    a.pitch = m | 1;
    block.each([&](uint32_t t) {
      for (uint32_t j = 0; j < n; ++j) {
        const T* const column = from + uint64_t{j} * args.pitch;
        for (uint32_t i = t; i < m; i += block.threads()) a.at(i, j) = column[i];
      }
    });
  }
  factor<kLanes, kOwn>(block, a, s, gram, kGramPitch);
  invert(block, gram, kGramPitch, n, s->tau);
  write_triangle(block, gram, kGramPitch, n, global<T>(args.triangles) + uint64_t{number} * n * n);
  block.each([&](uint32_t t) {
    for (uint32_t j = 0; j < n; ++j) {
      T* const column = from + uint64_t{j} * args.pitch;
      for (uint32_t i = t; i < args.above + j; i += block.threads()) {
        column[static_cast<int64_t>(i) - args.above] = 0;
      }
      if constexpr (!streams) {
        for (uint32_t i = j + t; i < m; i += block.threads()) column[i] = a.at(i, j);
      }
    }
    if (t < n) {
      const uint64_t at = uint64_t{number} * args.n + args.first + t;
      global<T>(args.tau)[at] = s->tau[t];
      global<T>(args.sign)[at] = sign_of(s->beta[t]);
    }
  });
}

// T of a block of columns in the place of its V'V. `shared`: its width times one more.
template <class T>
FI_FN void make_triangle(const Block& block, const QrArguments& args, uint32_t number,
                         uint32_t part, void* shared) {
  T* const triangle = static_cast<T*>(shared);
  const uint32_t most = args.width, first = (args.first + part) * most;
  const uint32_t n = args.n - first < most ? args.n - first : most, pitch = most + 1;
  T* const at = global<T>(args.triangles) + uint64_t{args.first + part} * args.jobs * most * most +
                uint64_t{number} * n * n;
  block.each([&](uint32_t t) {
    for (uint32_t e = t; e < n * n; e += block.threads()) {
      const uint32_t i = e / n, j = e - i * n;
      triangle[i * pitch + j] = at[e];
    }
  });
  invert(block, triangle, pitch, n, global<const T>(args.tau) + uint64_t{number} * args.n + first);
  write_triangle(block, triangle, pitch, n, at);
}

}  // namespace cuda
}  // namespace fastinit
