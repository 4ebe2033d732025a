// SPDX-License-Identifier: BSD-3-Clause
// Householder reflectors of an m x n matrix that one block of threads holds in fast memory: the
// factorisation A = QR, one pass over the matrix per column, and Q from the reflectors.
#pragma once

#include "block.h"
#include "launch.h"

namespace fastinit {
namespace cuda {

constexpr uint32_t kWarp = 32;

// What the threads of a block share. The sums of a column come from several threads (`parts`).
template <class T>
struct QrState {
  double squares[kWarp];  // of the next reflector, by warp
  T tau[kMostColumns];
  T beta[kMostColumns];  // diagonal of R
  T head[kMostColumns];  // first element of v
  T dots[2][kMostColumns];
};
static_assert(sizeof(QrState<float>) == 256 + 640 * sizeof(float) &&
                  sizeof(QrState<double>) == 256 + 640 * sizeof(double),
              "fastinit/cuda/qr.py counts 256 bytes and 640 elements");

template <class T>
struct Matrix {
  T* a;
  uint32_t m, n, pitch;
  FI_FN T* column(uint32_t j) const { return a + uint64_t{j} * pitch; }
  FI_FN T& at(uint32_t i, uint32_t j) const { return column(j)[i]; }
};

// A thread has `own` columns, `groups` apart, and shares them with lanes * parts - 1 others, which
// take turns at the rows.
template <uint32_t lanes, uint32_t own>
struct Split {
  uint32_t groups, parts, group, part, row, step;
  FI_FN Split(uint32_t threads, uint32_t columns, uint32_t thread) {
    groups = (columns + own - 1) / own;
    parts = threads / lanes / groups;
    group = thread / lanes % groups;
    part = thread / lanes / groups;
    row = part * lanes + thread % lanes;
    step = lanes * parts;
  }
  FI_FN bool is_idle() const { return part >= parts; }
  FI_FN uint32_t column(uint32_t c) const { return group + c * groups; }
};

template <class T>
struct Tiny;  // squared lengths up to this count as zero: 2 / x would be near overflow
template <>
struct Tiny<float> {
  static constexpr double value = 0x1p-120;
};
template <>
struct Tiny<double> {
  static constexpr double value = 0x1p-1000;
};

// The reflector of a column of so many elements, of which x is the first, and their sum of squares.
// tau belongs to v as rounded, so H is orthogonal to the last place but one even where beta is not.
template <class T>
FI_FN void reflector(uint32_t length, T x, double squares, T* tau, T* beta, T* head) {
  *tau = *beta = *head = 0;
  if (squares <= Tiny<T>::value) return;
  if (length == 1) {  // nothing to map: exact, as LAPACK has it
    *beta = x;
    return;
  }
  const T norm = root(static_cast<T>(squares));
  *beta = x < 0 ? norm : -norm;
  *head = x - *beta;
  const double square =
      squares + (static_cast<double>(*head) - x) * (static_cast<double>(*head) + x);
  *tau = 2 / static_cast<T>(square);
}

FI_FN double add_square(double x, double sum) { return fma(x, x, sum); }

template <class T>
FI_FN T sign_of(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : T(0);
}

// Parts of the products of a thread's columns with column k, of which the first of its lanes has
// the sums: kept, and summed up for column j.
template <uint32_t lanes, uint32_t own, class T>
FI_FN void keep_dots(const Block& block, uint32_t columns, uint32_t t, const Sums<T, own>& dots,
                     uint32_t k, QrState<T>* s) {
  const Split<lanes, own> split(block.threads(), columns, t);
  if (t % lanes != 0 || split.is_idle()) return;
#pragma unroll
  for (uint32_t c = 0; c < own; ++c) {
    s->dots[k & 1][split.column(c) * split.parts + split.part] = dots.x[c];
  }
}
template <class T>
FI_FN T sum_dots(const QrState<T>& s, uint32_t parts, uint32_t j, uint32_t k) {
  T dot = 0;
#pragma unroll 4
  for (uint32_t p = 0; p < parts; ++p) dot += s.dots[k & 1][j * parts + p];
  return dot;
}

// v' a_j, from the product with x, the column k of which v = x - beta e_1 was made.
template <class T>
FI_FN T product(const QrState<T>& s, const Matrix<T>& a, uint32_t parts, uint32_t j, uint32_t k) {
  return fma(-s.beta[k], a.at(k, j), sum_dots(s, parts, j, k));
}

// Reflectors k of all columns in place, heads on the diagonal; above it is left what was there.
// Column k is brought up to date and measured first; then one pass updates the columns behind it
// with reflector k - 1 and takes their dot products with column k. `gram`: null, or where V'V goes
// above the diagonal, (n, gram_pitch).
//
// When round k begins, with H_j = I - tau_j v_j v_j':
// - columns j < k are v_j, but v_{k-1} has its x on the diagonal still, as others read it; its head
//   is in s->head and is put there in this round;
// - columns j >= k have H_0 to H_{k-2} applied in rows from k - 1 on; row k - 1 is never written
//   again, so it is read as it was when the products with column k - 1 were taken;
// - s->dots[(k - 1) & 1] has x_{k-1}' a_j of all j, from which `product` makes v_{k-1}' a_j. The
//   products of this round go to the other half, as threads come to it at different times.
template <uint32_t lanes, uint32_t own, class T>
FI_FN void factor(const Block& block, const Matrix<T>& a, QrState<T>* s, T* gram,
                  uint32_t gram_pitch) {
  for (uint32_t k = 0; k <= a.n; ++k) {
    block.template sum<kWarp>(
        [&](uint32_t t) {
          Sums<double, 1> squares;
          const uint32_t parts = Split<lanes, own>(block.threads(), a.n, t).parts;
          T scale = 0;
          if (k > 0) {
            if (gram != nullptr && t < k - 1) {
              gram[t * gram_pitch + k - 1] = product(*s, a, parts, t, k - 1);
            }
            if (t == 0) a.at(k - 1, k - 1) = s->head[k - 1];
            if (k < a.n) scale = mul(s->tau[k - 1], product(*s, a, parts, k, k - 1));
          }
          if (k == a.n) return squares;
          T* const x = a.column(k);
          const T* const v = a.column(k == 0 ? 0 : k - 1);
          for (uint32_t i = k + t; i < a.m; i += block.threads()) {
            T value = x[i];
            if (k > 0) {
              value = fma(-scale, v[i], value);
              x[i] = value;
            }
            squares.x[0] = add_square(value, squares.x[0]);
          }
          return squares;
        },
        [&](uint32_t t, const Sums<double, 1>& squares) {
          if (t % kWarp == 0) s->squares[t / kWarp] = squares.x[0];
        });
    if (k == a.n) break;
    block.template sum<lanes>(
        [&](uint32_t t) {
          Sums<T, own> dots;
          if (t == 0) {
            double squares = 0;
            for (uint32_t w = 0; w < block.threads() / kWarp; ++w) squares += s->squares[w];
            reflector(a.m - k, a.at(k, k), squares, &s->tau[k], &s->beta[k], &s->head[k]);
          }
          const Split<lanes, own> split(block.threads(), a.n, t);
          if (split.is_idle()) return dots;
          T scale[own];
          bool moves[own], is_needed = false;
          uint32_t at[own];
#pragma unroll
          for (uint32_t c = 0; c < own; ++c) {
            const uint32_t j = split.column(c);
            moves[c] = k > 0 && j > k && j < a.n;
            is_needed |= j < a.n && (j > k || (gram != nullptr && j < k));
            at[c] = (j < a.n ? j : k) * a.pitch;  // what nobody asks for is computed all the same
            scale[c] = 0;
            if (moves[c]) scale[c] = mul(s->tau[k - 1], product(*s, a, split.parts, j, k - 1));
          }
          if (!is_needed) return dots;
          const T* const x = a.column(k);
          const T* const v = a.column(k == 0 ? 0 : k - 1);
          for (uint32_t i = k + split.row; i < a.m; i += split.step) {
            const T xi = x[i], vi = v[i];
            T value[own];
#pragma unroll
            for (uint32_t c = 0; c < own; ++c) value[c] = a.a[at[c] + i];
#pragma unroll
            for (uint32_t c = 0; c < own; ++c) {
              value[c] = fma(-scale[c], vi, value[c]);
              if (moves[c]) a.a[at[c] + i] = value[c];
              dots.x[c] = fma(xi, value[c], dots.x[c]);
            }
          }
          return dots;
        },
        [&](uint32_t t, const Sums<T, own>& dots) {
          keep_dots<lanes, own>(block, a.n, t, dots, k, s);
        });
  }
}

// The reflectors of columns from `first` on that are theirs already: nothing but lengths. A warp
// takes a column and tells keep(column, tau, beta, head).
template <class T, class Keep>
FI_FN void reflect(const Block& block, const Matrix<T>& a, uint32_t first, const Keep& keep) {
  block.template sum<kWarp>(
      [&](uint32_t t) {
        Sums<double, 1> squares;
        const uint32_t j = first + t / kWarp;
        if (j >= a.n) return squares;
        const T* const x = a.column(j);
        for (uint32_t i = j + t % kWarp; i < a.m; i += kWarp) {
          squares.x[0] = add_square(x[i], squares.x[0]);
        }
        return squares;
      },
      [&](uint32_t t, const Sums<double, 1>& squares) {
        const uint32_t j = first + t / kWarp;
        if (t % kWarp != 0 || j >= a.n) return;
        T tau, beta, head;
        reflector(a.m - j, a.at(j, j), squares.x[0], &tau, &beta, &head);
        a.at(j, j) = head;
        keep(j, tau, beta, head);
      });
}

// Q in the place of the reflectors, last column first: one pass per column applies H_k and takes
// the products with v_{k-1}. Column k is read as v_k by all threads meanwhile, so it becomes e_k -
// tau head v in the next pass, and column 0 when it is written out.
//
// When pass k begins:
// - columns j <= k + 1 are v_j; the pass makes H_{k+1} e_{k+1} of v_{k+1} on the way (own_scale),
//   and of v_k what H_k e_k will be, for its product only;
// - columns j > k + 1 are H_{k+1} ... H_j e_j, whose rows up to k are 0, whatever lies in memory;
// - s->dots[k & 1] has v_k' q_j of all j > k; the pass leaves v_{k-1}' q_j in the other half.
template <uint32_t lanes, uint32_t own, class T>
FI_FN void form(const Block& block, const Matrix<T>& a, QrState<T>* s) {
  for (uint32_t k = a.n - 1; k > 0 || a.n > 1; --k) {
    block.template sum<lanes>(
        [&](uint32_t t) {
          Sums<T, own> dots;
          const Split<lanes, own> split(block.threads(), a.n, t);
          if (split.is_idle()) return dots;
          T scale[own], own_scale[own];
          bool is_needed = false;
          uint32_t at[own];
#pragma unroll
          for (uint32_t c = 0; c < own; ++c) {
            const uint32_t j = split.column(c);
            at[c] = (j < a.n ? j : k) * a.pitch;
            is_needed |= j >= k && j < a.n;
            scale[c] = 0, own_scale[c] = 1;
            if (j < a.n && (j == k || j == k + 1)) own_scale[c] = -mul(s->tau[j], s->head[j]);
            if (j <= k || j >= a.n) continue;
            scale[c] = mul(s->tau[k], sum_dots(*s, split.parts, j, k));
          }
          if (!is_needed) return dots;
          const T* const v = a.column(k);
          const T* const next = a.column(k == 0 ? 0 : k - 1);
          for (uint32_t i = k + split.row; i < a.m; i += split.step) {
            const T vi = v[i], ni = next[i];
            T q[own];
#pragma unroll
            for (uint32_t c = 0; c < own; ++c) q[c] = a.a[at[c] + i];
#pragma unroll
            for (uint32_t c = 0; c < own; ++c) {
              const uint32_t j = split.column(c);
              const T unit = i == j && j <= k + 1 ? T(1) : T(0);
              q[c] = fma(own_scale[c], q[c], unit);
              if (j > k && i == k) q[c] = 0;
              q[c] = fma(-scale[c], vi, q[c]);
              if (j > k && j < a.n) a.a[at[c] + i] = q[c];
              dots.x[c] = fma(ni, q[c], dots.x[c]);
            }
          }
          return dots;
        },
        [&](uint32_t t, const Sums<T, own>& dots) {
          keep_dots<lanes, own>(block, a.n, t, dots, k + 1, s);
        });
    if (k == 0) break;
  }
}

}  // namespace cuda
}  // namespace fastinit
