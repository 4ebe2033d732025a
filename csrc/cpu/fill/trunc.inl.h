// SPDX-License-Identifier: BSD-3-Clause
// trunc_normal_ by rejection, as torch 2.12 and later do it. Compiled once per target.
//
// torch draws the whole tensor until no element is outside the bounds; an element keeps its first
// draw inside. `pending` has one bit per item, 16 to a group, and one more group for the last 16
// elements where their words are drawn anew (see write_normal). Rounds return how many still wait.

// Round 0 writes every element.
template <class Law>
uint64_t draw(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t end,
              uint16_t* pending) {
  using T = typename Law::T;
  const uint32_t leftover = end == d.items ? static_cast<uint32_t>(d.items % 16) : 0;
  const uint64_t groups = (end - leftover - begin) / 16;
  T* const tensor = reinterpret_cast<T*>(d.address);
  T* out = tensor + begin;
  uint16_t* mask = pending;
  constexpr uint32_t kGroups = Law::kItems / 16;
  const auto rest = [&](T* to, uint16_t* m) {
    uint32_t raw[Law::kStepWords + Words::kPad] = {};
    T values[Law::kItems];
    take_raw(w, raw, 16 * Law::kStepWords / Law::kItems);
    *m = static_cast<uint16_t>(law.write_and_test(raw, values));
    memcpy(to, values, 16 * sizeof *to);
  };
  each_step<Law::kStepWords>(w, groups / kGroups, [&](const uint32_t* x) {
    const uint32_t outside = law.write_and_test(x, out);
    for (uint32_t g = 0; g < kGroups; ++g) *mask++ = static_cast<uint16_t>(outside >> 16 * g);
    out += Law::kItems;
  });
  if (groups % kGroups != 0) rest(out, mask);
  pending[groups] = 0;
  if (leftover != 0) {
    pending[groups - 1] &= static_cast<uint16_t>((1u << leftover) - 1);
    if (sizeof(T) != 2) skip(w, w.position() + leftover * Law::kStepWords / Law::kItems);
    rest(tensor + d.items - 16, pending + groups);
  }
  uint64_t left = 0;
  for (uint64_t g = 0; g <= groups; ++g)
    left += static_cast<uint64_t>(__builtin_popcount(pending[g]));
  return left;
}

// A later round in which many wait: it computes all, and writes those. Returns how many groups are
// done, all but the last few.
template <class Law>
uint64_t redraw_all(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t groups,
                    uint16_t* pending, uint64_t* left) {
  using T = typename Law::T;
  constexpr uint32_t kGroups = Law::kItems / 16;
  T* out = reinterpret_cast<T*>(d.address) + begin;
  const uint64_t steps = groups / kGroups;
  each_step<Law::kStepWords>(w, steps, [&](const uint32_t* x) {
    uint32_t waiting = 0;
    memcpy(&waiting, pending, 2 * kGroups);
    alignas(64) T values[Law::kItems];
    const uint32_t again = waiting & law.write_and_test(x, values);
    put_where(out, values, waiting);
    memcpy(pending, &again, 2 * kGroups);
    *left += static_cast<uint64_t>(__builtin_popcount(again));
    pending += kGroups;
    out += Law::kItems;
  });
  return steps * kGroups;
}

// A later round where lanes can be squeezed: the pairs of words of which the cosine waits, and
// those of which the sine waits, are collected and computed a vector at a time.
template <Dtype dtype>
struct Squeezed {
  using T = typename Element<dtype>::T;
  struct Queue {
    alignas(64) uint32_t first[2 * kLanes], second[2 * kLanes], item[2 * kLanes];
    uint32_t filled = 0;
  };
  const Normal<dtype>& law;
  T* const out;
  uint16_t* const pending;
  uint64_t left = 0;
  Queue cosines = {}, sines = {};

  Squeezed(const Normal<dtype>& l, T* o, uint16_t* p) : law(l), out(o), pending(p) {}

  // A step of `kItems` elements, the first of which is `item`.
  FI_INLINE void take(const uint32_t* x, uint32_t waiting, uint32_t item) {
    static const uint32_t kItemOfLane[16] = {0,  1,  2,  3,  4,  5,  6,  7,
                                             16, 17, 18, 19, 20, 21, 22, 23};
    constexpr uint32_t kHalf = (1u << (kLanes < 8 ? kLanes : 8)) - 1;
    for (int j = 0; j < kPairs; j += kLanes) {
      U a, b;
      load_pairs(x + j, a, b);
      const U items = add(load(kItemOfLane), words(item + static_cast<uint32_t>(j)));
      uint32_t cos = waiting >> j & kHalf, sin = waiting >> (j + 8) & kHalf;
      if (kLanes == 16) {  // two groups of 16 elements side by side
        cos |= waiting >> 8 & 0xff00;
        sin |= waiting >> 16 & 0xff00;
      }
      put<false>(cosines, a, b, items, cos);
      put<true>(sines, a, b, add(items, words(8)), sin);
    }
  }

  template <bool kSin>
  FI_INLINE void put(Queue& q, U a, U b, U items, uint32_t which) {
    store(q.first + q.filled, squeezed(a, which));
    store(q.second + q.filled, squeezed(b, which));
    store(q.item + q.filled, squeezed(items, which));
    q.filled += static_cast<uint32_t>(__builtin_popcount(which));
    if (q.filled < kLanes) return;
    compute<kSin>(q, kLanes);
    store(q.first, load(q.first + kLanes));
    store(q.second, load(q.second + kLanes));
    store(q.item, load(q.item + kLanes));
    q.filled -= kLanes;
  }

  template <bool kSin>
  FI_INLINE void compute(const Queue& q, uint32_t n) {
    F low, high;
    law.of(load(q.first), load(q.second), low, high);
    low = Element<dtype>::rounded(kSin ? high : low);
    alignas(64) T values[2 * kPairs];
    Element<dtype>::template store<false>(values, low, low);
    for (uint32_t k = 0; k < n; ++k) out[q.item[k]] = values[k];
    uint32_t again = lanes_outside(low, law.lo, law.hi) & ((1u << n) - 1);
    for (; again != 0; again &= again - 1, ++left) {
      const uint32_t item = q.item[__builtin_ctz(again)];
      pending[item / 16] = static_cast<uint16_t>(pending[item / 16] | 1u << item % 16);
    }
  }
};

template <Dtype dtype>
uint64_t redraw_squeezed(const Normal<dtype>& law, const FillDesc& d, Words& w, uint64_t begin,
                         uint64_t groups, uint16_t* pending, uint64_t* left) {
  using Law = Normal<dtype>;
  using T = typename Law::T;
  constexpr uint32_t kGroups = Law::kItems / 16;
  Squeezed<dtype> chosen(law, reinterpret_cast<T*>(d.address) + begin, pending);
  const uint64_t steps = groups / kGroups;
  uint32_t item = 0;
  each_step<Law::kStepWords>(w, steps, [&](const uint32_t* x) {
    uint32_t waiting = 0;
    memcpy(&waiting, pending + item / 16, 2 * kGroups);
    memset(pending + item / 16, 0, 2 * kGroups);
    chosen.take(x, waiting, item);
    item += Law::kItems;
  });
  chosen.template compute<false>(chosen.cosines, chosen.cosines.filled);
  chosen.template compute<true>(chosen.sines, chosen.sines.filled);
  *left += chosen.left;
  return steps * kGroups;
}

// The groups of a later round that are done several at a time, if any; returns how many.
template <class Law>
uint64_t redraw_most(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t groups,
                     uint16_t* pending, uint64_t* left, bool many) {
  return many ? redraw_all(law, d, w, begin, groups, pending, left) : 0;
}
template <Dtype dtype>
uint64_t redraw_most(const Normal<dtype>& law, const FillDesc& d, Words& w, uint64_t begin,
                     uint64_t groups, uint16_t* pending, uint64_t* left, bool many) {
  if (!many) return 0;
  return kSqueezes ? redraw_squeezed(law, d, w, begin, groups, pending, left)
                   : redraw_all(law, d, w, begin, groups, pending, left);
}

// A later round in which few wait: it computes those only. Which they are is chance: their words
// are gathered into full steps, 16 elements each, of which the half they need is used.
template <class Law>
struct Redraw {
  using T = typename Law::T;
  static constexpr uint32_t kPerItem = Law::kStepWords / Law::kItems;
  static constexpr uint32_t kRoom = Law::kItems / 2;
  const Law& law;
  Words& w;
  uint16_t* pending;
  uint64_t left = 0;

  uint32_t filled = 0;
  T* to[kRoom];          // where an element belongs,
  uint32_t from[kRoom];  // where its step has it,
  uint64_t mark[kRoom];  // and its bit in `pending`
  alignas(64) uint32_t raw[Law::kStepWords + Words::kPad] = {};

  Redraw(const Law& l, Words& words, uint16_t* p) : law(l), w(words), pending(p) {}

  // The waiting ones of up to 4 groups, with the words from `position` and elements from `out` on.
  void gather(uint64_t group, uint32_t groups, uint64_t position, T* out) {
    uint64_t waiting = 0;
    memcpy(&waiting, pending + group, 2 * groups);
    if (waiting == 0) return;
    memset(pending + group, 0, 2 * groups);
    if (position + 16 * kPerItem * groups > w.base + w.end) {
      skip(w, position);
      if (position + 16 * kPerItem * groups > w.base + w.end) refill(w);
    }
    const uint32_t* x = w.x + (position - w.base);
    for (; waiting != 0; waiting &= waiting - 1) {
      const uint32_t i = static_cast<uint32_t>(__builtin_ctzll(waiting));
      const uint32_t first = (i / 16 * 16 + i % 8) * kPerItem;
      const uint32_t slot = filled / 8 * 16 + filled % 8;
      for (uint32_t k = 0; k < kPerItem; ++k) {
        raw[slot * kPerItem + k] = x[first + k];
        raw[(slot + 8) * kPerItem + k] = x[first + 8 * kPerItem + k];
      }
      to[filled] = out + i;
      from[filled] = slot + (i & 8);
      mark[filled] = 16 * group + i;
      if (++filled == kRoom) flush();
    }
  }

  void flush() {
    alignas(64) T values[Law::kItems];
    const uint32_t outside = law.write_and_test(raw, values);
    uint32_t again = 0;
    for (uint32_t p = 0; p < filled; ++p) {
      *to[p] = values[from[p]];
      again |= (outside >> from[p] & 1) << p;
    }
    for (; again != 0; again &= again - 1) {
      const uint64_t bit = mark[__builtin_ctz(again)];
      pending[bit / 16] = static_cast<uint16_t>(pending[bit / 16] | 1u << bit % 16);
      ++left;
    }
    filled = 0;
  }
};

template <class Law>
uint64_t redraw(const Law& law, const FillDesc& d, Words& w, uint64_t begin, uint64_t end,
                uint16_t* pending, uint64_t last) {
  using T = typename Law::T;
  Redraw<Law> waiting(law, w, pending);
  constexpr uint32_t kGroupWords = 16 * Redraw<Law>::kPerItem;
  const uint32_t leftover = end == d.items ? static_cast<uint32_t>(d.items % 16) : 0;
  const uint64_t groups = (end - leftover - begin) / 16, start = w.position();
  T* const tensor = reinterpret_cast<T*>(d.address);
  const bool many = last * Law::kAllWorth > end - begin;
  uint64_t g = redraw_most(law, d, w, begin, groups, pending, &waiting.left, many);
  for (; g < groups; g += 4) {
    const uint32_t n = static_cast<uint32_t>(groups - g < 4 ? groups - g : 4);
    waiting.gather(g, n, start + kGroupWords * g, tensor + begin + 16 * g);
  }
  if (leftover != 0) {
    const uint64_t skipped = sizeof(T) == 2 ? 0 : leftover * Redraw<Law>::kPerItem;
    waiting.gather(groups, 1, start + kGroupWords * groups + skipped, tensor + d.items - 16);
  }
  if (waiting.filled != 0) waiting.flush();
  return waiting.left;
}

template <class Law>
uint64_t trunc_law(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, uint16_t* pending,
                   uint64_t last) {
  const Law law(d);
  return last == 0 ? draw(law, d, w, begin, end, pending)
                   : redraw(law, d, w, begin, end, pending, last);
}

// Not by as_dtype: g++ 12 would inline less of the laws.
uint64_t trunc(const FillDesc& d, Words& w, uint64_t begin, uint64_t end, uint16_t* pending,
               uint64_t last) {
  const bool cephes = d.flavour & kCephes;
  switch (d.dtype) {
    case Dtype::f32:
      return cephes ? trunc_law<Normal<Dtype::f32>>(d, w, begin, end, pending, last)
                    : trunc_law<NormalLibm<Dtype::f32, float>>(d, w, begin, end, pending, last);
    case Dtype::bf16:
      return cephes ? trunc_law<Normal<Dtype::bf16>>(d, w, begin, end, pending, last)
                    : trunc_law<NormalLibm<Dtype::bf16, float>>(d, w, begin, end, pending, last);
    case Dtype::f16:
      return cephes ? trunc_law<Normal<Dtype::f16>>(d, w, begin, end, pending, last)
                    : trunc_law<NormalLibm<Dtype::f16, float>>(d, w, begin, end, pending, last);
    case Dtype::f64:
      break;
  }
  return trunc_law<NormalLibm<Dtype::f64, double>>(d, w, begin, end, pending, last);
}
