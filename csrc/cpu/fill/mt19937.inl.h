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
// words that follow (jump.h): 624 sums of about 10,000 words each. Sums of neighbours, x[i] +
// x[i+1], x[i] + x[i+2] and all three, take three coefficients at a time, from one that is set on:
// half as many additions. A chunk of the words is in the first-level cache, a strip of sums in
// registers.
void jump(Words& w, const Jump& by) {
  constexpr uint32_t kStrip = 8 * kLanes, kChunk = 1024, kMost = kChunk / 3 + 1;
  constexpr uint32_t kSums = (Words::kState + kStrip - 1) / kStrip * kStrip;
  constexpr uint32_t kSpan = kChunk + kSums, kSize = kSpan + kLanes;  // two words more are read
  alignas(64) uint32_t x[4][kSize], sums[kSums] = {};
  uint16_t place[kMost];  // in all of x

  const uint64_t target = w.base + by.distance;
  w.pos = 1;
  take_raw(w, x[0] + kChunk, kSize - kChunk);
  for (uint32_t chunk = 0, at = 0; chunk < Jump::kDegree; chunk += kChunk) {
    memmove(x[0], x[0] + kChunk, 4 * (kSize - kChunk));
    take_raw(w, x[0] + kSize - kChunk, kChunk);
    for (uint32_t i = 0; i < kSpan; i += kLanes) {
      const U one = load(x[0] + i), two = one ^ load(x[0] + i + 1), third = load(x[0] + i + 2);
      store(x[1] + i, two);
      store(x[2] + i, one ^ third);
      store(x[3] + i, two ^ third);
    }
    uint32_t count = 0;
    while (at < chunk + kChunk && at < Jump::kDegree) {
      const uint64_t here = by.term[at / 64] >> (at % 64);
      if (here == 0) {
        at = (at / 64 + 1) * 64;
        continue;
      }
      at += static_cast<uint32_t>(__builtin_ctzll(here));
      if (at >= chunk + kChunk) break;
      const uint32_t shift = at % 64, next = at / 64 + 1;
      uint64_t bits = by.term[at / 64] >> shift;
      if (shift > 61 && next < Jump::kWords) bits |= by.term[next] << (64 - shift);
      place[count++] = static_cast<uint16_t>((bits >> 1 & 3) * kSize + at - chunk);
      at += 3;
    }
    for (uint32_t strip = 0; strip < Words::kState; strip += kStrip) {
      uint32_t* out = sums + strip;
      U s0 = load(out), s1 = load(out + kLanes), s2 = load(out + 2 * kLanes);
      U s3 = load(out + 3 * kLanes), s4 = load(out + 4 * kLanes), s5 = load(out + 5 * kLanes);
      U s6 = load(out + 6 * kLanes), s7 = load(out + 7 * kLanes);
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t* from = x[0] + strip + place[i];
        s0 = s0 ^ load(from);
        s1 = s1 ^ load(from + kLanes);
        s2 = s2 ^ load(from + 2 * kLanes);
        s3 = s3 ^ load(from + 3 * kLanes);
        s4 = s4 ^ load(from + 4 * kLanes);
        s5 = s5 ^ load(from + 5 * kLanes);
        s6 = s6 ^ load(from + 6 * kLanes);
        s7 = s7 ^ load(from + 7 * kLanes);
      }
      store(out, s0);
      store(out + kLanes, s1);
      store(out + 2 * kLanes, s2);
      store(out + 3 * kLanes, s3);
      store(out + 4 * kLanes, s4);
      store(out + 5 * kLanes, s5);
      store(out + 6 * kLanes, s6);
      store(out + 7 * kLanes, s7);
    }
  }
  memcpy(w.x, sums, 4 * Words::kState);
  w.base = target;
  w.pos = 0;
  w.end = Words::kState;
}
