// SPDX-License-Identifier: BSD-3-Clause
// Where the workers of a run begin in one generator's sequence, found together: about one jump for
// each worker, and polynomials that are squares of one another instead of one for each.
//
// On its own, a worker that begins 2^22 words or more ahead takes a polynomial (2 to 5 M
// instructions), a jump (0.4 M) and up to 7 M words of skipping: at 64 threads 0.8 times as much as
// 2^28 uniform numbers. Workers of one law begin at first + i * step, so the state of i is one jump
// away from that of i without its lowest binary digit. Otherwise steps are finer, and a worker
// shares the jumps of its higher digits with others.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../surface.h"
#include "cursor.h"

namespace fastinit {

class Starts {
 public:
  // `positions`: of the workers; their sequence begins with the state.
  Starts(const Target& target, const TorchState* state, std::vector<uint64_t> positions)
      : target_(target), state_(state), positions_(std::move(positions)) {
    const uint64_t count = positions_.size();
    if (count < 2 || !std::is_sorted(positions_.begin(), positions_.end())) return;
    const uint64_t step = (positions_.back() - positions_[0]) / (count - 1);
    if (static_cast<double>(step) * kSkipCost < kJumpCost) return;
    uint64_t late = 0, early = 0;  // by how much others begin beside first + i * step
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t even = positions_[0] + i * step, real = positions_[i];
      late = std::max(late, real > even ? real - even : 0);
      early = std::max(early, real < even ? even - real : 0);
    }
    const bool is_even = early < positions_[0] && late + early < step / 16;
    origin_ = positions_[0] - (is_even ? early : 0);
    unit_ = (is_even ? step : step / kFiner) / Words::kState * Words::kState;
    for (uint64_t i = 0; i < count; ++i) {
      uint64_t n = place(i);
      while (nodes_.emplace(n, nullptr).second && n != 0) n &= n - 1;
    }
    for (auto& entry : nodes_) entry.second.reset(new Node(target));
  }

  // Moves a cursor near to the i-th position. Any thread may ask; who needs a state that another is
  // finding waits for it, but never for one that nobody has begun.
  void prepare(uint64_t i, Cursor& cursor) {
    if (unit_ != 0) cursor.follow(find(place(i)));
  }

 private:
  struct Node {
    explicit Node(const Target& target) : cursor(target) {}
    std::once_flag once;
    Cursor cursor;
  };

  uint64_t place(uint64_t i) const { return (positions_[i] - origin_) / unit_; }

  const Cursor& find(uint64_t n) {
    Node& node = *nodes_.at(n);
    std::call_once(node.once, [&] {
      if (n == 0) {
        node.cursor.at(state_, origin_ / Words::kState * Words::kState);
        return;
      }
      int digit = 0;
      while ((n >> digit & 1) == 0) ++digit;
      const std::shared_ptr<const Jump> jump = power(digit);
      node.cursor.follow(find(n & (n - 1)));
      node.cursor.jump(*jump);
    });
    return node.cursor;
  }

  std::shared_ptr<const Jump> power(int digit) {  // over unit * 2^digit words
    std::lock_guard<std::mutex> lock(mutex_);
    if (powers_.empty()) powers_.push_back(make_jump(unit_));
    while (static_cast<int>(powers_.size()) <= digit) {
      powers_.push_back(make_double(*powers_.back()));
    }
    return powers_[static_cast<size_t>(digit)];
  }

  static constexpr uint64_t kFiner = 32;

  const Target& target_;
  const TorchState* state_;
  const std::vector<uint64_t> positions_;
  uint64_t origin_ = 0, unit_ = 0;  // unit 0: everyone finds their own way
  std::map<uint64_t, std::unique_ptr<Node>> nodes_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Jump>> powers_;
};

}  // namespace fastinit
