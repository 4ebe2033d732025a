// SPDX-License-Identifier: BSD-3-Clause
// Jump-ahead for MT19937 (Haramoto et al. 2008): how to get from a state to the one far ahead.
#pragma once

#include <cstdint>
#include <memory>

namespace fastinit {

// p(t) = t^(distance - 1) modulo the characteristic polynomial of the recurrence; bit i of `term`
// is the coefficient of t^i. Word distance + j = xor over the terms of word[1 + i + j], j >= 0.
// The sum starts at word 1 because the low 31 bits of a state's first word do not take part in
// the recurrence (after seeding they are arbitrary), and ends up with all bits of every word right.
struct Jump {
  static constexpr int32_t kDegree = 19937;
  static constexpr int32_t kWords = kDegree / 64 + 1;
  uint64_t distance;
  uint64_t term[kWords];
};

// Computes the jump or takes it from a cache of the most recent ones. distance >= 1. Thread-safe.
std::shared_ptr<const Jump> make_jump(uint64_t distance);
std::shared_ptr<const Jump> make_double(const Jump&);  // over twice its distance
// Whether a jump is worth having that saves so many nanoseconds each time: it is cached, or what it
// would have saved so far exceeds what it costs to compute. Models repeat their shapes.
bool jump_pays(uint64_t distance, double saves);
uint64_t jumps_made();  // in this process, from the cache or not

}  // namespace fastinit
