// SPDX-License-Identifier: BSD-3-Clause
// Orthogonal matrices: what is asked for, how a matrix lies while it is worked on, and the threads
// that work on one together. qr.inl.h has the arithmetic, qr.cpp divides the work.
#pragma once

#include <atomic>
#include <cstdint>

#include "../../fill_desc.h"

namespace fastinit {

struct Control;
class Interrupt;

// gain times the orthogonal factor of a Gaussian matrix. As fastinit/cpu/qr.py packs it.
struct QrDesc {
  uint64_t gaussian;   // rows * cols floats, doubles for f64; of direct ones see qr.inl.h
  uint64_t out;        // rows * cols elements; may be the same memory
  int64_t rows, cols;  // not 0
  int64_t count;       // of such matrices, one behind the other
  double gain;
  Dtype dtype;     // of `out`
  uint8_t direct;  // the reflectors are given, not found by factoring
  uint8_t unused[6];
};
FI_LAYOUT(QrDesc, FI_FIELD(gaussian), FI_FIELD(out), FI_FIELD(rows), FI_FIELD(cols),
          FI_FIELD(count), FI_FIELD(gain), FI_FIELD(dtype), FI_FIELD(direct), FI_UNUSED(unused));

// The matrix, transposed if it is wide (m >= n), lies in stripes of 128 bytes of columns: a row of
// a stripe is two cache lines, the next row follows it. Nothing is ever packed again for a product.
constexpr int kStripeBytes = 128;
constexpr int kBlock = 4;  // stripes whose reflectors are applied together, at most

// Whether it is computed in double. For few columns, where products do not take most of the time,
// that costs little, and the result is the exact one, rounded.
constexpr int64_t kFewColumns = 64;
inline bool is_wide(const QrDesc& d) {
  return d.dtype == Dtype::f64 || d.rows <= kFewColumns || d.cols <= kFewColumns;
}

struct Shape {
  int64_t m, n, padded, stripes, blocks;  // padded: rows, as the tiles of products need them
  int per_block, stripe;                  // stripes of a block, columns of a stripe
  bool wide;                              // in double

  explicit Shape(const QrDesc& d)
      : m(d.rows < d.cols ? d.cols : d.rows),
        n(d.rows < d.cols ? d.rows : d.cols),
        padded((m + 7) / 8 * 8),
        stripe(kStripeBytes / (is_wide(d) ? 8 : 4)),
        wide(is_wide(d)) {
    stripes = (n + stripe - 1) / stripe;
    // Deeper products are faster, until factoring a block in one thread is what takes the time.
    per_block = stripes <= 16 ? 1 : stripes <= 32 ? 2 : kBlock;
    blocks = (stripes + per_block - 1) / per_block;
  }

  int64_t given(bool direct) const {  // entries of `gaussian`
    return direct ? n * (n + 1) / 2 + (m - n) * n : m * n;
  }
  int64_t width() const { return int64_t{per_block} * stripe; }  // of a block
  int64_t stripe_items() const { return padded * stripe; }
  int64_t t_items() const { return width() * width(); }  // of a block's T

  // Where things are in the workspace, in items.
  int64_t copy_at() const { return stripes * stripe_items(); }  // of a block's reflectors
  int64_t t_at() const { return copy_at() + per_block * stripe_items(); }
  int64_t signs_at() const { return t_at() + blocks * t_items(); }
  int64_t panel_at() const { return signs_at() + stripes * stripe; }
  int64_t panel_items() const {  // a stripe of floats in double, and its T
    return wide ? 0 : 2 * (padded * 32 + 32 * 32 + 3 * 32 * 16);
  }
  int64_t scratch_at(int worker) const {
    return panel_at() + panel_items() + worker * scratch_items();
  }
  int64_t scratch_items() const { return 3 * width() * stripe; }
  int64_t items(int workers) const { return scratch_at(workers); }
  double flops() const { return 8.0 / 3 * static_cast<double>(m) * n * n; }
};

// The threads that work on one matrix. A phase ends at a barrier; its pieces are handed out to
// whoever asks first.
class Team {
 public:
  Team(int workers, Interrupt* interrupt) : workers_(workers), interrupt_(interrupt) {}
  int64_t claim() { return next_.fetch_add(1); }
  // Waits for all. False: the work is to be abandoned, by all of them.
  bool barrier();

 private:
  const int workers_;
  Interrupt* const interrupt_;  // or nullptr: it is somebody else's to ask
  std::atomic<int64_t> next_{0};
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
  std::atomic<bool> stop_{false}, stopped_{false};
};

// Writes the matrices, of one each, and marks in `done` which are written. False: interrupted.
struct Target;
bool run_qr(const Target&, const QrDesc*, int64_t count, char* done, const Control&);

}  // namespace fastinit
