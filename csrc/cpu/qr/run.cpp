// SPDX-License-Identifier: BSD-3-Clause
// Divides orthogonal matrices between threads: many small ones side by side, large ones one after
// the other with all threads. Results do not depend on the division.

#include "qr.h"

#include "../pages.h"

#include <algorithm>
#include <cstdlib>
#include <future>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "../surface.h"
#include "../threads.h"

namespace fastinit {
namespace {

constexpr double kRate = 30;            // operations per ns and thread, to divide work by
constexpr double kOverhead = 20e3;      // operations that a small matrix costs besides
constexpr int64_t kCanShare = 1 << 16;  // elements that are enough for several threads,
constexpr uint64_t kShared = 8 << 20;   // bytes to work in that are too many for each thread

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory to work in. Fresh pages cost more than what is computed in them unless they are large.
std::unique_ptr<void, Free> allocate(uint64_t bytes) {
  const uint64_t unit = bytes >= 2 * kHugePage ? kHugePage : 64;
  std::unique_ptr<void, Free> p(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
  if (p == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (unit == kHugePage) madvise(p.get(), bytes, MADV_HUGEPAGE);
#endif
  return p;
}

uint64_t bytes_of(const QrDesc& d, int workers) {
  if (d.rows == 1 || d.cols == 1) return 1;
  return static_cast<uint64_t>(Shape(d).items(workers)) * (is_wide(d) ? 8 : 4);
}

double cost_of(const QrDesc& d) { return Shape(d).flops() + kOverhead; }

// `share`: the work of a thread. Matrices of half of it or more could not be divided evenly.
bool is_shared(const QrDesc& d, double share) {
  const bool can = d.rows * d.cols >= kCanShare;
  return can && (bytes_of(d, 1) >= kShared || cost_of(d) >= share / 2);
}

// Calls body(team, worker) in each of them, which must not throw; fewer than asked for if there are
// no more threads.
template <class Body>
void as_team(int threads, Interrupt* interrupt, const Body& body) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  std::promise<Team*> started;
  const std::shared_future<Team*> team = started.get_future().share();
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { body(*team.get(), i); });
  } catch (...) {  // whatever it is: those that run are enough
  }
  Team all(static_cast<int>(others.size()) + 1, interrupt);
  started.set_value(&all);
  body(all, 0);
  for (std::thread& t : others) t.join();
}

}  // namespace

bool Team::barrier() {
  if (interrupt_ != nullptr && interrupt_->raised()) stop_ = true;
  const uint32_t phase = phase_;
  if (arrived_.fetch_add(1) + 1 == workers_) {
    arrived_ = 0;
    next_ = 0;
    stopped_ = stop_.load();
    phase_ = phase + 1;
  } else {
    for (int i = 0; phase_ == phase; ++i) {
      if (i > 1000) std::this_thread::yield();
    }
  }
  return !stopped_;
}

bool run_qr(const Target& target, const QrDesc* matrices, int64_t count, char* done,
            const Control& control) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += cost_of(matrices[i]);
  std::vector<int64_t> shared, small;
  double cost = 0;
  uint64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (is_shared(matrices[i], total / control.threads)) {
      shared.push_back(i);
    } else {
      small.push_back(i);
      cost += cost_of(matrices[i]);
      bytes = std::max(bytes, bytes_of(matrices[i], 1));
    }
  }
  // The most expensive first, so that all threads end at about the same time.
  std::stable_sort(small.begin(), small.end(), [&](int64_t a, int64_t b) {
    return cost_of(matrices[a]) > cost_of(matrices[b]);
  });
  Interrupt interrupt(control);
  std::atomic<size_t> next{0};
  const int threads = std::min<int64_t>(worth_threads(cost / kRate, control), small.size());
  if (threads > 0) {
    parallel(threads, [&](int) {
      const std::unique_ptr<void, Free> work = allocate(bytes);
      for (size_t i; (i = next++) < small.size() && !interrupt.raised();) {
        Team alone(1, nullptr);
        target.qr(matrices[small[i]], work.get(), alone, 0);
        done[small[i]] = 1;
      }
    });
  }
  if (interrupt.was_raised()) return false;
  for (const int64_t i : shared) {
    const QrDesc& d = matrices[i];
    const int most = worth_threads(cost_of(d) / kRate, control);
    const std::unique_ptr<void, Free> work = allocate(bytes_of(d, most));
    bool finished = false;
    as_team(most, &interrupt, [&](Team& team, int worker) {
      if (target.qr(d, work.get(), team, worker) && worker == 0) finished = true;
    });
    if (!finished) return false;
    done[i] = 1;
  }
  return true;
}

}  // namespace fastinit
