// SPDX-License-Identifier: BSD-3-Clause
// Runs plans: divides the items of all fills between threads, by cost and in order, so that each
// thread moves forward once through each generator's words. Results do not depend on the division.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../surface.h"
#include "cursor.h"
#include "starts.h"
#include "../pages.h"
#include "../threads.h"

namespace fastinit {
namespace {

constexpr uint64_t kTileItems = 4096;  // items; a multiple of 16 and of all vectors
constexpr uint64_t kSparseTile = 64;   // columns
constexpr int64_t kCursors = 16;       // of a worker; sources beyond that share them

uint64_t tile_of(const FillDesc& d) { return d.op == Op::sparse_mask ? kSparseTile : kTileItems; }

// The last tile takes the remainder, so that the elements torch draws twice have one owner.
uint64_t tiles_of(const FillDesc& d) { return std::max<uint64_t>(1, d.items / tile_of(d)); }

double item_cost(const FillDesc& d) {  // ns on one thread, see cursor.h
  const bool wide = d.dtype == Dtype::f64;
  switch (d.op) {
    case Op::constant:
    case Op::diagonal:
      return 0.05 * element_size(d.dtype);
    case Op::uniform:
      return wide ? 2.0 : 0.35;
    case Op::normal:
    case Op::trunc_normal:
      return wide ? 10.0 : d.flavour & kCephes ? 0.8 : 8.0;
    case Op::normal_pairs:
      return 14.0;
    case Op::sparse_mask:
      return 2.0 * static_cast<double>(d.sparse.rows);
    case Op::trunc_erfinv:
      break;
  }
  return 1.0;
}

uint64_t words_before(const FillDesc& d, uint64_t item) {
  switch (d.op) {
    case Op::normal_pairs:  // the first item is the cached sample if d.hi says so
      return item == 0 ? 0 : (item - (d.hi != 0)) / 2 * 4;
    case Op::sparse_mask:
      return item * static_cast<uint64_t>(d.sparse.rows - 1);
    default:
      return d.dtype == Dtype::f64 ? 2 * item : item;
  }
}

uint64_t bytes_of(const FillDesc& d) {
  return d.items * static_cast<uint64_t>(element_size(d.dtype));
}

struct TilePlace {  // in the concatenation of all tiles of all fills
  int64_t fill;
  uint64_t tile;
};

// Cuts the work into consecutive shares that take equally long, finding the words included: who
// starts later in a sequence gets less to do.
class Division {
 public:
  Division(const FillDesc* fills, int64_t count, const std::vector<char>& fresh)
      : fills_(fills), before_(static_cast<size_t>(count) + 1) {
    for (int64_t i = 0; i < count; ++i) {
      const double touch = fresh[i] ? kTouchCost * element_size(fills[i].dtype) : 0;
      before_[i + 1] =
          before_[i] + (item_cost(fills[i]) + touch) * static_cast<double>(fills[i].items);
    }
  }

  double total() const { return before_.back(); }

  std::vector<TilePlace> shares(int threads) const {
    double low = total() / threads, high = total();
    for (int i = 0; i < 20; ++i) {
      const double middle = (low + high) / 2;
      (cut(threads, middle, nullptr) ? high : low) = middle;
    }
    std::vector<TilePlace> places;
    cut(threads, high, &places);
    places.resize(static_cast<size_t>(threads) + 1, end());
    places.back() = end();
    return places;
  }

 private:
  TilePlace end() const { return {static_cast<int64_t>(before_.size()) - 1, 0}; }

  TilePlace place(double cost) const {
    const auto it = std::upper_bound(before_.begin(), before_.end(), cost);
    if (it == before_.end()) return end();
    const int64_t fill = it - before_.begin() - 1;
    const double width = before_[fill + 1] - before_[fill];
    const double tiles = static_cast<double>(tiles_of(fills_[fill]));
    return {fill, static_cast<uint64_t>((cost - before_[fill]) / width * tiles)};
  }

  bool cut(int threads, double time, std::vector<TilePlace>* places) const {
    double cost = 0;
    for (int i = 0; i < threads && cost < total(); ++i) {
      const TilePlace p = place(cost);
      if (places != nullptr) places->push_back(p);
      const FillDesc& d = fills_[p.fill];
      double seek = 0;
      if (d.source >= 0) {
        const uint64_t words = d.first_word + words_before(d, p.tile * tile_of(d));
        seek = std::min(static_cast<double>(words) * kSkipCost, kJumpCost + kPolynomialCost);
      }
      cost += std::max(0.0, time - seek);
    }
    return cost >= total();
  }

  const FillDesc* fills_;
  std::vector<double> before_;
};

// The first words that each worker needs, and those who find them together.
class Beginnings {
 public:
  Beginnings(const Target& target, const FillDesc* fills, const std::vector<TilePlace>& places,
             const Source* sources)
      : of_(places.size()) {
    std::vector<uint64_t> positions;
    int64_t source = -1;
    const auto finish = [&] {
      if (positions.empty()) return;
      starts_.emplace_back(new Starts(target, sources[source].state, std::move(positions)));
      positions.clear();
    };
    for (size_t worker = 1; worker + 1 < places.size(); ++worker) {
      TilePlace from = places[worker];
      const TilePlace to = places[worker + 1];
      while (from.fill < to.fill && fills[from.fill].source < 0) from = {from.fill + 1, 0};
      if (from.fill == to.fill && from.tile >= to.tile) continue;  // nothing to do, or no words
      const FillDesc& d = fills[from.fill];
      if (d.source < 0) continue;
      if (d.source != source) finish();
      source = d.source;
      of_[worker] = {source, starts_.size(), positions.size()};
      positions.push_back(position_of(*sources[source].state) + d.first_word +
                          words_before(d, from.tile * tile_of(d)));
    }
    finish();
  }

  void prepare(size_t worker, std::vector<Cursor>& cursors) {
    const Place& p = of_[worker];
    if (p.source >= 0) {
      starts_[p.starts]->prepare(p.index, cursors[static_cast<size_t>(p.source % kCursors)]);
    }
  }

 private:
  struct Place {
    int64_t source = -1;
    size_t starts = 0, index = 0;
  };
  std::vector<Place> of_;
  std::vector<std::unique_ptr<Starts>> starts_;
};

}  // namespace

bool run_fill(const Target& target, const FillDesc* fills, int64_t count, Source* sources,
              int64_t source_count, const Control& control) {
  uint64_t bytes = 0;
  std::vector<char> fresh(static_cast<size_t>(count));
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (int64_t i = 0; i < count; ++i) {
    const FillDesc& d = fills[i];
    bytes += bytes_of(d);
    fresh[i] = d.rank == 0 && d.op != Op::sparse_mask && is_fresh(d.address, bytes_of(d));
    if (fresh[i]) ranges.emplace_back(d.address, d.address + bytes_of(d));
  }
  ask_for_huge_pages(std::move(ranges));
  const bool large = bytes >= kStreamBytes;
  const Division division(fills, count, fresh);
  const int threads = worth_threads(division.total(), control);
  const std::vector<TilePlace> places = division.shares(threads);

  Interrupt interrupt(control);
  std::vector<double> cached(static_cast<size_t>(count));
  // A cursor for each worker and source, as plans may alternate between generators; plans of many
  // sources use one after the other.
  std::vector<std::vector<Cursor>> cursors(static_cast<size_t>(threads));
  for (auto& own : cursors) {
    for (int64_t s = 0; s < std::min(source_count, kCursors); ++s) own.emplace_back(target);
  }
  Beginnings beginnings(target, fills, places, sources);
  parallel(threads, [&](int worker) {
    Words unused;
    unused.pos = unused.end = 0;
    beginnings.prepare(static_cast<size_t>(worker), cursors[worker]);
    const TilePlace from = places[worker], to = places[worker + 1];
    for (int64_t f = from.fill; f <= to.fill && f < count; ++f) {
      const FillDesc& d = fills[f];
      const uint64_t tile = tile_of(d), tiles = tiles_of(d);
      uint64_t first = f == from.fill ? from.tile : 0;
      const uint64_t last = f == to.fill ? to.tile : tiles;
      // About a millisecond of work between questions for Ctrl-C.
      const uint64_t piece =
          std::max<uint64_t>(1, static_cast<uint64_t>(1e6 / item_cost(d)) / tile);
      for (; first < last; first = std::min(last, first + piece)) {
        if (interrupt.raised()) return;
        const uint64_t until = std::min(last, first + piece);
        const uint64_t begin = first * tile, end = until == tiles ? d.items : until * tile;
        Words* words = &unused;
        double sample = 0;
        if (d.source >= 0) {
          const TorchState* state = sources[d.source].state;
          const uint64_t start = position_of(*state) + d.first_word;
          words = &cursors[worker][d.source % kCursors].at(state, start + words_before(d, begin));
          sample = state->normal_y;
        }
        target.fill(d, *words, begin, end, large && !fresh[f], &sample);
        if (end == d.items) cached[f] = sample;
      }
    }
  });
  if (interrupt.was_raised()) return false;

  for (int64_t s = 0; s < source_count; ++s) {
    if (sources[s].words_drawn == 0) continue;
    const uint64_t position = position_of(*sources[s].state) + sources[s].words_drawn;
    cursors[threads - 1][s % kCursors].close(sources[s].state, position);
  }
  for (int64_t f = 0; f < count; ++f) {
    const FillDesc& d = fills[f];
    if (d.op != Op::normal_pairs || d.items == 0) continue;
    TorchState& state = *sources[d.source].state;
    state.normal_is_valid = (d.items - (d.hi != 0)) % 2 != 0;
    state.normal_y = state.normal_is_valid ? cached[f] : 0;
  }
  return true;
}

// torch draws the whole tensor again and again until no element is outside the bounds, and takes
// each element from the first draw that is inside. The words of a round lie `round_words` behind
// those of the one before: a worker keeps one cursor per round and takes a chunk of the tensor
// through all the rounds it needs while it is in the cache.
uint64_t run_trunc(const Target& target, const FillDesc& d, TorchState* state,
                   const Control& control) {
  constexpr uint64_t kChunk = 8;  // tiles: 128 KB of float, 4 KB of masks
  if (is_fresh(d.address, bytes_of(d))) {
    ask_for_huge_pages({{d.address, d.address + bytes_of(d)}});
  }
  const uint64_t per_item = d.dtype == Dtype::f64 ? 2 : 1, rest = d.items % 16;
  const uint64_t drawn = element_size(d.dtype) == 2 ? d.items - rest : d.items;
  const uint64_t round_words = per_item * (drawn + (rest != 0 ? 16 : 0));
  const uint64_t tiles = tiles_of(d), start = position_of(*state) + d.first_word;
  const int threads = worth_threads(2.5 * item_cost(d) * static_cast<double>(d.items), control);

  const auto first_tile = [&](int worker) { return tiles * worker / threads; };
  std::vector<uint64_t> positions;
  for (int worker = 1; worker < threads; ++worker) {
    positions.push_back(start + first_tile(worker) * kTileItems * per_item);
  }
  Starts starts(target, state, std::move(positions));

  Interrupt interrupt(control);
  std::vector<std::vector<Cursor>> cursors(static_cast<size_t>(threads));
  parallel(threads, [&](int worker) {
    std::vector<Cursor>& rounds = cursors[worker];
    rounds.emplace_back(target);
    if (worker > 0) starts.prepare(static_cast<uint64_t>(worker - 1), rounds[0]);
    std::vector<uint16_t> pending((kChunk + 2) * kTileItems / 16);
    const uint64_t stop = first_tile(worker + 1);
    for (uint64_t tile = first_tile(worker); tile < stop; tile += kChunk) {
      const uint64_t until = std::min(stop, tile + kChunk);
      const uint64_t begin = tile * kTileItems, end = until == tiles ? d.items : until * kTileItems;
      uint64_t left = 0;
      for (size_t round = 0; round == 0 || left != 0; ++round) {
        if (interrupt.raised()) return;
        if (round == rounds.size()) {  // from where the round before has got to, it is not far
          rounds.push_back(Cursor(rounds[round - 1]));
        }
        Words& w = rounds[round].at(state, start + round * round_words + begin * per_item);
        left = target.trunc(d, w, begin, end, pending.data(), left);
      }
    }
  });
  if (interrupt.was_raised()) return 0;
  std::vector<Cursor>* longest = &cursors[0];
  for (auto& rounds : cursors) {
    if (rounds.size() >= longest->size()) longest = &rounds;
  }
  const uint64_t total = longest->size();
  longest->back().close(state, start + total * round_words);
  return total;
}

void advance(const Target& target, TorchState* state, uint64_t words) {
  if (words < static_cast<uint64_t>(state->left)) {  // within the block
    state->next += words;
    state->left -= static_cast<int32_t>(words);
  } else {
    const uint64_t position = position_of(*state) + words;
    Cursor(target).close(state, position);
  }
}

}  // namespace fastinit
