// SPDX-License-Identifier: BSD-3-Clause
// The contract between Python (fastinit/cuda/qr.py packs it) and the kernels that make orthonormal
// columns of Gaussian matrices. A is the matrix, transposed if it has more columns than rows: m x
// n, m >= n, and lies column by column in working memory.
//
// Reflectors are not scaled: H = I - tau v v', where v = x - beta e_1, beta = -sign(x_1) ||x||.
#pragma once

#include <cstdint>

#include "../../fill_desc.h"

namespace fastinit {
namespace cuda {

constexpr uint32_t kMostColumns = 128;  // of a matrix in shared memory
constexpr uint32_t kMostPanel = 32;     // columns of a panel
constexpr uint32_t kQrTile = 32;        // rows and columns that are moved at a time
constexpr uint32_t kMostQrJobs = 96;    // matrices that travel in a kernel's arguments

struct QrJob {
  uint64_t from;  // address of the Gaussian matrix
  uint64_t to;    // and of the result; may be the same
  double gain;
  uint32_t rows, cols;
  Dtype dtype;  // of the result
  uint8_t unused[7];
};
FI_LAYOUT(QrJob, FI_FIELD(from), FI_FIELD(to), FI_FIELD(gain), FI_FIELD(rows), FI_FIELD(cols),
          FI_FIELD(dtype), FI_UNUSED(unused));

// What one launch does. The first needs no working memory, the others are steps for matrices of one
// shape: numbers to columns, reflectors of all columns (direct only), reflectors and T of a panel,
// T from V'V, columns to results.
enum class QrStep : uint32_t { small, pack, reflect, panel, triangle, write };
constexpr Code kQrSteps[] = {FI_CODE(QrStep, small),    FI_CODE(QrStep, pack),
                             FI_CODE(QrStep, reflect),  FI_CODE(QrStep, panel),
                             FI_CODE(QrStep, triangle), FI_CODE(QrStep, write)};

// Everything a launch gets.
struct QrArguments {
  uint64_t table;      // address of the jobs in device memory; 0: they are inlined
  uint64_t columns;    // (jobs, n, pitch): A, then V, then Q
  uint64_t triangles;  // panel: (jobs, width, width), T. triangle: (blocks, jobs * most * most)
  uint64_t tau;        // (jobs, n)
  uint64_t sign;       // (jobs, n): of the diagonal of R, 0 for a column of zeros
  uint32_t jobs, m, n;
  uint32_t pitch;   // elements from one column to the next
  uint32_t direct;  // 1: the Gaussian matrix is packed, and its columns are the x of the reflectors
  uint32_t is_double;  // the Gaussian matrix; else float
  uint32_t first;      // panel: column where it starts. triangle: block where the launch starts
  uint32_t width;      // panel: its columns. triangle: most columns of a block
  uint32_t above;      // panel: rows above it where V has zeros
  uint32_t streams;    // panel: 1 if it does not fit into shared memory
  QrJob inlined[kMostQrJobs];
};
FI_LAYOUT(QrArguments, FI_FIELD(table), FI_FIELD(columns), FI_FIELD(triangles), FI_FIELD(tau),
          FI_FIELD(sign), FI_FIELD(jobs), FI_FIELD(m), FI_FIELD(n), FI_FIELD(pitch),
          FI_FIELD(direct), FI_FIELD(is_double), FI_FIELD(first), FI_FIELD(width), FI_FIELD(above),
          FI_FIELD(streams), FI_FIELD(inlined));
static_assert(sizeof(QrArguments) <= 4096, "kernel arguments");

// How a step is launched. A block of `panel` and `small` is one matrix (x); of `reflect` a column
// for each warp (x) of a matrix (y); of `triangle` a block of columns (x) of a matrix (y); of
// `pack` and `write` a tile (x) of a matrix (y).
struct QrGrid {
  uint32_t x, y, threads, shared;
};

}  // namespace cuda
}  // namespace fastinit
