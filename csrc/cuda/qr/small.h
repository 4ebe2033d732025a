// SPDX-License-Identifier: BSD-3-Clause
// A matrix that fits into the shared memory of one block: read, factored, formed, written.
#pragma once

#include "../target.h"
#include "reflect.h"

namespace fastinit {
namespace cuda {

// A reference, though its loads are generic: nvcc 13.0 does not come to an end with copies of it.
FI_FN const QrJob& job_of(const QrArguments& args, uint32_t number) {
  return (args.table != 0 ? global<const QrJob>(args.table) : args.inlined)[number];
}

// An element of the lower trapezoid of an m x n matrix, in the order of its rows.
FI_FN uint64_t packed(uint32_t i, uint32_t j, uint32_t n) {
  if (i < n) return uint64_t{i} * (i + 1) / 2 + j;
  return uint64_t{n} * (n + 1) / 2 + uint64_t{i - n} * n + j;
}

// Element (i, j) of A in the Gaussian matrix, and in the result unless packed.
FI_FN uint64_t place(const QrJob& job, bool is_packed, uint32_t i, uint32_t j) {
  if (is_packed) return packed(i, j, job.rows < job.cols ? job.rows : job.cols);
  return job.rows < job.cols ? uint64_t{j} * job.cols + i : uint64_t{i} * job.cols + j;
}

template <Dtype dtype, class T>
FI_FN void store_as(uint64_t to, uint64_t at, T x) {
  using E = Element<dtype>;
  store(to + at * sizeof(typename E::T), E::code(x));
}

// Rounded once. float64 results come from float64, and only they.
FI_FN void store_result(const QrJob& job, uint64_t at, float x) {
  if (job.dtype == Dtype::f32) return store_as<Dtype::f32>(job.to, at, x);
  if (job.dtype == Dtype::bf16) return store_as<Dtype::bf16>(job.to, at, x);
  store_as<Dtype::f16>(job.to, at, x);
}
FI_FN void store_result(const QrJob& job, uint64_t at, double x) {
  store_as<Dtype::f64>(job.to, at, x);
}

// Of a block for a matrix with more than a few columns: lanes that share columns, and most threads.
// Twice the threads of float64 would leave them 64 registers, and nvcc 13.0 would spill for A100.
template <class T>
struct Medium {
  static constexpr uint32_t kLanes = sizeof(T) == 8 ? 16 : 32;
  static constexpr uint32_t kThreads = 32 * kLanes;
};

// A step for one matrix. `shared`: of QrState<T> and n * (m | 1) elements. Columns have an odd
// distance, so that reading along a row meets all banks, too.
template <uint32_t lanes, uint32_t own, class T>
FI_FN void orthonormalize_small(const Block& block, const QrArguments& args, uint32_t number,
                                void* shared) {
  QrState<T>* const s = static_cast<QrState<T>*>(shared);
  const QrJob& job = job_of(args, number);
  const bool wide = job.rows < job.cols, direct = args.direct != 0;
  const uint32_t m = wide ? job.cols : job.rows, n = wide ? job.rows : job.cols;
  const Matrix<T> a = {reinterpret_cast<T*>(s + 1), m, n, m | 1};
  const bool by_columns = wide && !direct;
  const uint32_t fast = by_columns ? m : n;
  block.each([&](uint32_t t) {
    const T* const from = global<const T>(job.from);
    for (uint32_t e = t; e < m * n; e += block.threads()) {
      const uint32_t slow = e / fast, rest = e - slow * fast;
      const uint32_t i = by_columns ? rest : slow, j = by_columns ? slow : rest;
      if (!direct || i >= j) a.at(i, j) = from[place(job, direct, i, j)];
    }
  });
  if (direct) {
    for (uint32_t first = 0; first < n; first += block.threads() / kWarp) {
      reflect(block, a, first, [&](uint32_t j, T tau, T beta, T head) {
        s->tau[j] = tau, s->beta[j] = beta, s->head[j] = head;
      });
    }
  } else {
    factor<lanes, own>(block, a, s, static_cast<T*>(nullptr), 0);
  }
  form<lanes, own>(block, a, s);
  block.each([&](uint32_t t) {
    const T gain = static_cast<T>(job.gain), first = -mul(s->tau[0], s->head[0]);
    for (uint32_t e = t; e < m * n; e += block.threads()) {
      const uint32_t slow = e / job.cols, rest = e - slow * job.cols;
      const uint32_t i = wide ? rest : slow, j = wide ? slow : rest;
      T q = a.at(i, j);
      if (j == 0) q = fma(first, q, i == 0 ? T(1) : T(0));
      store_result(job, e, mul(mul(q, sign_of(s->beta[j])), gain));
    }
  });
}

}  // namespace cuda
}  // namespace fastinit
