// SPDX-License-Identifier: BSD-3-Clause
// MT19937 (Matsumoto and Nishimura 1998) in vectors, bit for bit. Compiled once per target.
//
//   word i + 624 = word[i + 397] ^ twist(upper bit of word[i], lower 31 bits of word[i + 1])
//
// Written over a linear buffer, not a ring, the recurrence needs no special cases: the nearest
// input lies 227 words back, farther than any vector is long.

FI_INLINE U temper(U y) {
  y = y ^ shr<11>(y);
  y = y ^ (shl<7>(y) & words(0x9d2c5680u));
  y = y ^ (shl<15>(y) & words(0xefc60000u));
  return y ^ shr<18>(y);
}

// w0, w1 and w397: words i, i + 1 and i + 397.
FI_INLINE U twist(U w0, U w1, U w397) {
  const U y = (w0 & words(0x80000000u)) | (w1 & words(0x7fffffffu));
  return w397 ^ shr<1>(y) ^ if_odd(w1, words(0x9908b0dfu));
}

// Drops all but the last state and produces words up to the capacity.
inline void refill(Words& w) {
  const uint32_t drop = w.end - Words::kState;
  if (drop != 0) memmove(w.x, w.x + drop, 4 * Words::kState);
  constexpr uint32_t kFar = 397 / kLanes * kLanes;
  const uint32_t* x = w.x;
  U near = load(x), far = load(x + kFar);
  for (uint32_t i = 0; i < Words::kCapacity - Words::kState; i += kLanes) {
    const U near_next = load(x + i + kLanes), far_next = load(x + i + kFar + kLanes);
    store(w.x + Words::kState + i, twist(near, window<1 % kLanes>(near, near_next, x + i + 1),
                                         window<397 % kLanes>(far, far_next, x + i + 397)));
    near = near_next;
    far = far_next;
  }
  w.base += drop;
  w.pos -= drop;
  w.end = Words::kCapacity;
}

void skip(Words& w, uint64_t position) {
  while (position > w.base + w.end) {
    w.pos = w.end;
    refill(w);
  }
  w.pos = static_cast<uint32_t>(position - w.base);
}

// Copies n untempered words out.
FI_INLINE void take_raw(Words& w, uint32_t* out, uint32_t n) {
  while (n != 0) {
    if (w.pos == w.end) refill(w);
    const uint32_t k = n < w.end - w.pos ? n : w.end - w.pos;
    memcpy(out, w.x + w.pos, 4 * k);
    w.pos += k;
    out += k;
    n -= k;
  }
}

FI_INLINE void temper_all(const uint32_t* raw, uint32_t* out, uint32_t n) {
  for (uint32_t i = 0; i < n; i += kLanes) store(out + i, temper(load(raw + i)));
}

// Calls body(untempered words) once per step of `step` words, `steps` times.
template <uint32_t step, class Body>
FI_INLINE void each_step(Words& w, uint64_t steps, Body&& body) {
  while (steps != 0) {
    uint64_t ready = (w.end - w.pos) / step;
    if (ready == 0) {
      refill(w);
      continue;
    }
    if (ready > steps) ready = steps;
    const uint32_t* x = w.x + w.pos;
    for (uint64_t i = 0; i < ready; ++i, x += step) body(x);
    w.pos += static_cast<uint32_t>(ready * step);
    steps -= ready;
  }
}

// An array that is freed again; std::unique_ptr would be a template shared between targets.
template <class T>
struct Scratch {
  explicit Scratch(uint64_t n) : p(static_cast<T*>(calloc(n, sizeof(T)))) {
    if (p == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { free(p); }
  Scratch(const Scratch&) = delete;
  T& operator[](uint64_t i) const { return p[i]; }
  T* const p;
};

// Moves the window's first word on by by.distance. The new state is a GF(2) combination of the
// words that follow (jump.h): 624 sums of about 10,000 words each, a strip of them held in
// registers.
void jump(Words& w, const Jump& by) {
  constexpr uint32_t kStrip = 8 * kLanes;
  constexpr uint32_t kSums = (Words::kState + kStrip - 1) / kStrip * kStrip;
  const Scratch<uint32_t> ahead(1 + Jump::kDegree + kSums);  // 82 KB, too much for some stacks
  const Scratch<uint16_t> exponent(Jump::kDegree);
  uint32_t sums[kSums];
  int32_t terms = 0;
  for (int32_t i = 0; i < Jump::kDegree; ++i) {
    exponent[terms] = static_cast<uint16_t>(i);
    terms += by.term[i / 64] >> (i % 64) & 1;
  }

  const uint64_t target = w.base + by.distance;
  w.pos = 0;
  take_raw(w, ahead.p, 1 + Jump::kDegree + Words::kState);
  for (uint32_t strip = 0; strip < Words::kState; strip += kStrip) {
    U s0 = words(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    for (int32_t i = 0; i < terms; ++i) {
      const uint32_t* x = ahead.p + 1 + strip + exponent[i];
      s0 = s0 ^ load(x);
      s1 = s1 ^ load(x + kLanes);
      s2 = s2 ^ load(x + 2 * kLanes);
      s3 = s3 ^ load(x + 3 * kLanes);
      s4 = s4 ^ load(x + 4 * kLanes);
      s5 = s5 ^ load(x + 5 * kLanes);
      s6 = s6 ^ load(x + 6 * kLanes);
      s7 = s7 ^ load(x + 7 * kLanes);
    }
    uint32_t* out = sums + strip;
    store(out, s0);
    store(out + kLanes, s1);
    store(out + 2 * kLanes, s2);
    store(out + 3 * kLanes, s3);
    store(out + 4 * kLanes, s4);
    store(out + 5 * kLanes, s5);
    store(out + 6 * kLanes, s6);
    store(out + 7 * kLanes, s7);
  }
  memcpy(w.x, sums, 4 * Words::kState);
  w.base = target;
  w.pos = 0;
  w.end = Words::kState;
}
