// SPDX-License-Identifier: BSD-3-Clause
// Where a worker stands in a generator's sequence of words.
#pragma once

#include <cstring>
#include <memory>

#include "../surface.h"

namespace fastinit {

// Costs in nanoseconds, measured with AVX-512; they only steer how work is divided.
constexpr double kSkipCost = 0.13;         // per word
constexpr double kJumpCost = 140e3;        // apply a polynomial
constexpr double kPolynomialCost = 700e3;  // compute one, of 2^23 words

// Positions count from the first word of the state: a state with `left` words to go is at
// 625 - left, also right after seeding, when left = 1 although nothing was drawn.
inline uint64_t position_of(const TorchState& s) { return 625 - static_cast<uint64_t>(s.left); }

class Cursor {
 public:
  explicit Cursor(const Target& target) : target_(target), words_(new Words) {}

  Cursor(const Cursor& other)
      : target_(other.target_), words_(new Words(*other.words_)), state_(other.state_) {}
  Cursor(Cursor&&) = default;

  Words& at(const TorchState* state, uint64_t position) {
    if (state != state_ || position < words_->base) open(state);
    Words& w = *words_;
    for (;;) {
      const double skip = static_cast<double>(position - w.base) * kSkipCost;
      if (skip < kJumpCost) break;
      const uint64_t distance = jump_distance(position - w.base);
      if (!jump_pays(distance, static_cast<double>(distance) * kSkipCost - kJumpCost)) break;
      target_.jump(w, *make_jump(distance));
    }
    if (position < w.position()) {
      w.pos = static_cast<uint32_t>(position - w.base);
    } else {
      target_.skip(w, position);
    }
    return w;
  }

  void follow(const Cursor& other) {
    *words_ = *other.words_;
    state_ = other.state_;
  }

  // Moves on by the jump's distance from the first word of the window, not from the last asked for.
  void jump(const Jump& by) { target_.jump(*words_, by); }

  // Leaves the generator as torch does after its word `position` - 1: in the block of that word.
  void close(TorchState* state, uint64_t position) {
    const uint64_t block = (position - 1) / Words::kState * Words::kState;
    const Words& w = at(state, block + 1);
    const uint32_t* x = w.x + (block - w.base);
    for (uint32_t i = 0; i < Words::kState; ++i) state->words[i] = x[i];
    state->next = position - block;
    state->left = static_cast<int32_t>(Words::kState + 1 - state->next);
    state_ = nullptr;
  }

 private:
  // Whole states, and only six leading bits, so that similar tensors share polynomials.
  static uint64_t jump_distance(uint64_t distance) {
    uint64_t blocks = distance / Words::kState, unit = 1;
    while (blocks / unit >= 64) unit *= 2;
    return blocks / unit * unit * Words::kState;
  }

  void open(const TorchState* state) {
    Words& w = *words_;
    for (uint32_t i = 0; i < Words::kState; ++i) w.x[i] = static_cast<uint32_t>(state->words[i]);
    w.base = 0;
    w.pos = static_cast<uint32_t>(position_of(*state));
    w.end = Words::kState;
    state_ = state;
  }

  const Target& target_;
  std::unique_ptr<Words> words_;
  const TorchState* state_ = nullptr;
};

}  // namespace fastinit
