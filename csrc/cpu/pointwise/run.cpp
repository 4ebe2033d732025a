// SPDX-License-Identifier: BSD-3-Clause
// Runs arithmetic in place, whose threads take one piece after the other.

#include <algorithm>
#include <atomic>
#include <vector>

#include "../surface.h"
#include "../threads.h"

namespace fastinit {

bool run_pointwise(const Target& target, const PointwiseDesc* all, int64_t count,
                   const Control& control) {
  constexpr int64_t kPiece = 1 << 16;  // items between questions for Ctrl-C
  constexpr double kItemCost = 0.3;    // ns on one thread, which waits for memory
  constexpr double kErfinvCost = 1.5;
  struct Piece {
    const PointwiseDesc* desc;
    int64_t begin;
  };
  std::vector<Piece> pieces;
  double cost = 0;
  for (const PointwiseDesc* d = all; d != all + count; ++d) {
    for (int64_t begin = 0; begin < d->items; begin += kPiece) pieces.push_back({d, begin});
    cost += (d->erfinv == 0 ? kItemCost : kErfinvCost) * static_cast<double>(d->items);
  }
  Interrupt interrupt(control);
  std::atomic<size_t> next{0};
  parallel(worth_threads(cost, control), [&](int) {
    for (size_t i; (i = next++) < pieces.size() && !interrupt.raised();) {
      const auto& [d, begin] = pieces[i];
      target.pointwise(*d, begin, std::min(d->items, begin + kPiece));
    }
  });
  return !interrupt.was_raised();
}

}  // namespace fastinit
