// SPDX-License-Identifier: BSD-3-Clause
// Runs keyed fills. No element depends on another, so the work is cut into equal shares anywhere.

#include <algorithm>
#include <vector>

#include "../surface.h"
#include "../pages.h"
#include "../threads.h"

namespace fastinit {
namespace {

constexpr uint64_t kPiece = 1 << 18;  // items between questions for Ctrl-C

double item_cost(const KeyedDesc& d) {  // ns on one thread
  const bool wide = d.dtype == Dtype::f64;
  const bool scattered = d.dim[0].step != 1 || d.dim[0].stride != 1 || d.dim[0].size < 32;
  const double way = scattered ? 3.0 : 0;
  switch (d.op) {
    case Op::uniform:
      return way + (wide ? 2.0 : 0.6);
    case Op::normal:
      return way + (wide ? 8.0 : 1.0);
    case Op::trunc_normal:
      return way + (wide ? 20.0 : 1.5);
    case Op::sparse_mask:
      return 3.0 * static_cast<double>(d.sparse.rows);
    default:
      return way / 2 + 0.05 * element_size(d.dtype);
  }
}

// First byte and the one behind the last.
std::pair<uint64_t, uint64_t> extent_of(const KeyedDesc& d) {
  int64_t last = 0;
  for (int k = 0; k < d.rank; ++k) last += (d.dim[k].size - 1) * d.dim[k].stride;
  const uint64_t size = static_cast<uint64_t>(element_size(d.dtype));
  return {d.address, d.address + (static_cast<uint64_t>(last) + 1) * size};
}

}  // namespace

bool run_keyed(const Target& target, const KeyedDesc* fills, int64_t count,
               const Control& control) {
  uint64_t bytes = 0;
  double total = 0;
  std::vector<double> cost(static_cast<size_t>(count));
  std::vector<char> fresh(static_cast<size_t>(count));
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (int64_t i = 0; i < count; ++i) {
    const KeyedDesc& d = fills[i];
    bytes += d.items * static_cast<uint64_t>(element_size(d.dtype));
    cost[i] = item_cost(d);
    if (d.op != Op::sparse_mask) {
      const auto range = extent_of(d);
      fresh[i] = is_fresh(range.first, range.second - range.first);
      if (fresh[i]) {
        ranges.push_back(range);
        cost[i] += kTouchCost * element_size(d.dtype);
      }
    }
    total += cost[i] * static_cast<double>(d.items);
  }
  ask_for_huge_pages(ranges);
  const bool large = bytes >= kStreamBytes;
  const int threads = worth_threads(total, control);

  Interrupt interrupt(control);
  parallel(threads, [&](int worker) {
    // This worker's share of all items, by what they cost.
    const double from = total * worker / threads, to = total * (worker + 1) / threads;
    double before = 0;
    for (int64_t i = 0; i < count; ++i) {
      const KeyedDesc& d = fills[i];
      const double whole = cost[i] * static_cast<double>(d.items);
      const auto cut = [&](double at) {  // to whole cache lines
        if (at <= before) return uint64_t{0};
        if (at >= before + whole) return d.items;
        const uint64_t unit = d.op == Op::sparse_mask ? 16 : 256;
        return std::min(d.items, static_cast<uint64_t>((at - before) / cost[i]) / unit * unit);
      };
      const uint64_t end = worker + 1 == threads ? d.items : cut(to);
      for (uint64_t begin = cut(from); begin < end; begin += kPiece) {
        if (interrupt.raised()) return;
        target.keyed(d, begin, std::min(end, begin + kPiece), large && !fresh[i]);
      }
      before += whole;
    }
  });
  return !interrupt.was_raised();
}

}  // namespace fastinit
