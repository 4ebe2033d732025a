// SPDX-License-Identifier: BSD-3-Clause
// The surface of the CPU backend: what the targets offer, and what runs plans with them.
#pragma once

#include <cstdint>

#include "../keyed_desc.h"
#include "../fill_desc.h"
#include "../pointwise_desc.h"
#include "fill/jump.h"
#include "qr/qr.h"

namespace fastinit {

// A window that moves forward over one MT19937 sequence. Words are counted from the first word of
// the state the window was opened on; x[i] is word base + i, not yet tempered.
struct Words {
  static constexpr uint32_t kState = 624;
  static constexpr uint32_t kCapacity = 4 * kState;  // 10 KB: a third of an L1 cache of 32 KB
  static constexpr uint32_t kPad = 32;               // vectors may read and write past the end
  alignas(64) uint32_t x[kCapacity + kPad];
  uint64_t base;
  uint32_t pos, end;  // x[pos, end) are the words at hand

  uint64_t position() const { return base + pos; }
};

struct Target {
  const char* name;
  bool (*supported)();
  // Moves the window to a later position by producing all words up to it.
  void (*skip)(Words&, uint64_t position);
  // Moves the window's base on by the jump's distance, without producing what lies between.
  void (*jump)(Words&, const Jump&);
  // Writes items [begin, end) of a fill; `words` stands at the first word of item `begin`.
  // `cached` is read and written by normal_pairs only. stream: bypass the cache.
  void (*fill)(const FillDesc&, Words& words, uint64_t begin, uint64_t end, bool stream,
               double* cached);
  // One round of trunc_normal_ on items [begin, end): the first writes all of them and marks in
  // `pending` (one bit per item) those outside the bounds, later ones rewrite marked items.
  // Returns how many are still pending, of which the next round is told; 0: it is the first.
  uint64_t (*trunc)(const FillDesc&, Words& words, uint64_t begin, uint64_t end, uint16_t* pending,
                    uint64_t waiting);
  // As one of the team that works on a matrix. False: abandoned.
  bool (*qr)(const QrDesc&, void* work, Team&, int worker);
  // Writes items [begin, end) of a keyed fill.
  void (*keyed)(const KeyedDesc&, uint64_t begin, uint64_t end, bool stream);
  // Does the steps to items [begin, end).
  void (*pointwise)(const PointwiseDesc&, int64_t begin, int64_t end);
};

const Target* targets(int* count);            // the compiled ones, best first
const Target* find_target(const char* name);  // "": the best one that runs here; or nullptr

struct Control {
  int threads;
  bool (*interrupted)();  // asked now and then by the calling thread; may be null
};

// One torch generator: its state, advanced by run_*, and the words the plan draws from it.
struct Source {
  TorchState* state;
  uint64_t words_drawn;
};

// Runs fills that touch different memory. False if interrupted: then the tensors are partly written
// and the sources as before.
bool run_fill(const Target&, const FillDesc*, int64_t count, Source*, int64_t source_count,
              const Control&);
// Runs one trunc_normal fill. Returns how often torch draws the whole tensor; 0 if interrupted.
uint64_t run_trunc(const Target&, const FillDesc&, TorchState*, const Control&);

// Runs keyed fills that touch different memory. False if interrupted: they are partly written.
bool run_keyed(const Target&, const KeyedDesc*, int64_t count, const Control&);

// Does arithmetic to tensors in different memory. False if interrupted: it is partly done.
bool run_pointwise(const Target&, const PointwiseDesc*, int64_t count, const Control&);

// Moves a generator on by so many words.
void advance(const Target&, TorchState*, uint64_t words);

}  // namespace fastinit
