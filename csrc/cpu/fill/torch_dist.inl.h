// SPDX-License-Identifier: BSD-3-Clause
// The laws of torch's CPU generator, operation by operation. Compiled once per target.
//
// These reproduce what ATen/native/cpu/DistributionTemplates.h computes, including which
// multiplications and additions its compiler merged into one rounding; fastinit/probe.py holds them
// against the running torch before they are used. A law turns one step of untempered words into
// kItems consecutive elements: `write` them, or besides report, one bit each, which lie outside
// [lo, hi]: `write_and_test`.

constexpr float kUnit24 = 1.0f / 16777216;  // 2^-24

FI_INLINE double unit53(const uint32_t* w) {  // torch's random64: the first word is the high half
  const uint64_t r = (static_cast<uint64_t>(w[0]) << 32 | w[1]) & ((uint64_t{1} << 53) - 1);
  return static_cast<double>(r) * 1.1102230246251565e-16;  // 2^-53
}

// How floats become elements: `coded` rounds and may leave rubbish below the bits that are stored,
// `rounded` is the value as a float again, `store` takes two vectors of either.
template <Dtype>
struct Element {
  using T = double;
};

template <>
struct Element<Dtype::f32> {
  using T = float;
  static FI_INLINE F coded(F v) { return v; }
  static FI_INLINE F rounded(F v) { return v; }
  template <bool kStream>
  static FI_INLINE void store(T* p, F low, F high) {
    put_f32<kStream>(p, low, high);
  }
};

template <>
struct Element<Dtype::bf16> {
  using T = uint16_t;
  static FI_INLINE F coded(F v) { return code_bf16(v); }
  static FI_INLINE F rounded(F v) { return view(bits(code_bf16(v)) & words(0xffff0000u)); }
  template <bool kStream>
  static FI_INLINE void store(T* p, F low, F high) {
    put_bf16<kStream>(p, low, high);
  }
};

template <>
struct Element<Dtype::f16> {
  using T = uint16_t;
  static FI_INLINE F coded(F v) { return v; }
  static FI_INLINE F rounded(F v) { return round_f16(v); }
  template <bool kStream>
  static FI_INLINE void store(T* p, F low, F high) {
    put_f16<kStream>(p, low, high);
  }
};

// Scalars; torch goes through float to the 16-bit types.
FI_INLINE float rounded_to(Dtype dtype, float v) {
  uint32_t lanes[kLanes];
  const F f = floats(v);
  store(lanes, bits(dtype == Dtype::bf16  ? Element<Dtype::bf16>::rounded(f)
                    : dtype == Dtype::f16 ? Element<Dtype::f16>::rounded(f)
                                          : f));
  memcpy(&v, lanes, 4);
  return v;
}
FI_INLINE void set_element(double* p, Dtype, double v) { *p = v; }
FI_INLINE void set_element(float* p, Dtype, double v) { *p = static_cast<float>(v); }
FI_INLINE void set_element(uint16_t* p, Dtype dtype, double v) {
  const F f = floats(static_cast<float>(v));
  uint16_t pair[2 * kPairs];
  if (dtype == Dtype::f16) {
    put_f16<false>(pair, f, f);
  } else {
    put_bf16<false>(pair, code_bf16(f), f);
  }
  *p = pair[0];
}

// uniform_, one word per element: k of 24 bits, from + range * (k / 2^24). A value that rounds up
// to `to` becomes `from`; kClamp: that can happen.
template <Dtype dtype, bool kContract, bool kClamp>
struct Uniform {
  using T = typename Element<dtype>::T;
  static constexpr uint32_t kItems = 2 * kPairs, kStepWords = 2 * kPairs;
  F from, range, from_element, to_element;  // range: of a step of k, exact (plan.py sees to it)

  explicit Uniform(const FillDesc& d)
      : from(floats(static_cast<float>(d.a))),
        range(floats((static_cast<float>(d.b) - static_cast<float>(d.a)) * kUnit24)),
        from_element(floats(rounded_to(dtype, static_cast<float>(d.a)))),
        to_element(floats(rounded_to(dtype, static_cast<float>(d.b)))) {}

  FI_INLINE F value(const uint32_t* x) const {
    const F v = unrounded(to_float(temper(load(x)) & words(0x00ffffffu)));
    if (!kClamp) return Element<dtype>::coded(v);
    const F r = Element<dtype>::rounded(v);
    return if_equal(r, to_element, from_element, r);
  }
  FI_INLINE F unrounded(F k) const { return kContract ? fma(k, range, from) : k * range + from; }

  template <bool kStream>
  FI_INLINE void write(const uint32_t* x, T* out) const {
    for (int j = 0; j < kPairs; j += kLanes) {
      Element<dtype>::template store<kStream>(out + j, value(x + j), value(x + kPairs + j));
    }
  }
};

// Values grow with k, so the largest k tells whether any value is `to`.
template <Dtype dtype, bool kContract>
bool reaches_end(const FillDesc& d) {
  const Uniform<dtype, kContract, false> law(d);
  const F r = Element<dtype>::rounded(law.unrounded(floats(16777215.0f)));
  uint32_t lanes[kLanes];
  store(lanes, bits(if_equal(r, law.to_element, floats(1.0f), floats(0.0f))));
  return lanes[0] != 0;
}

// -2 log(v) of a positive normal float: cephes logf as ATen's avx_mathfun.h evaluates it, with
// every coefficient times -2. Scaling by powers of two commutes with rounding, and so it does here
// with torch's separate multiplication. v = m 2^e with m in [sqrt(1/2), sqrt(2)); x = m - 1 is
// exact.
FI_INLINE F minus_2_log(F v) {
  const U steps = sub(bits(v), words(0x3f3504f3u));  // bits of sqrt(1/2)
  const F e = to_float(sra<23>(steps));
  const F x = view(sub(bits(v), steps & words(0xff800000u))) - floats(1.0f);
  const F z = x * x;
  F y = floats(-2 * 7.0376836292e-2f);
  y = fma(y, x, floats(-2 * -1.1514610310e-1f));
  y = fma(y, x, floats(-2 * 1.1676998740e-1f));
  y = fma(y, x, floats(-2 * -1.2420140846e-1f));
  y = fma(y, x, floats(-2 * 1.4249322787e-1f));
  y = fma(y, x, floats(-2 * -1.6668057665e-1f));
  y = fma(y, x, floats(-2 * 2.0000714765e-1f));
  y = fma(y, x, floats(-2 * -2.4999993993e-1f));
  y = fma(y, x, floats(-2 * 3.3333331174e-1f));
  y = fma(y * x, z, e * floats(-2 * -2.12194440e-4f));
  y = y + z;  // torch: y - z / 2
  return fma(e, floats(-2 * 0.693359375f), fma(x, floats(-2.0f), y));
}

// sin and cos of theta = 2 pi k / 2^24, rounded to float: cephes sinf and cosf, likewise. They
// round 4 theta / pi up to an even octant j; for all 2^24 values of k that is 2 * ((k + 2^21) >>
// 22). The sine changes sign with bit 2 of j, the cosine with bit 2 of j + 2, bit 1 swaps the
// polynomials.
FI_INLINE void sin_cos(U k, F theta, F& sin, F& cos) {
  const U t = add(k, words(1u << 21));                       // bit 22 + i of t = bit 1 + i of j
  const F octants = to_float(t & words(~((1u << 22) - 1)));  // 2^21 j
  constexpr float kScale = 1.0f / (1 << 21);
  F x = fma(octants, floats(-0.78515625f * kScale), theta);
  x = fma(octants, floats(-2.4187564849853515625e-4f * kScale), x);
  x = fma(octants, floats(-3.77489497744594108e-8f * kScale), x);
  const F z = x * x;
  F c = floats(2.443315711809948e-5f);
  c = fma(c, z, floats(-1.388731625493765e-3f));
  c = fma(c, z, floats(4.166664568298827e-2f));
  c = fms(c * z, z, z * floats(0.5f)) + floats(1.0f);
  F s = floats(-1.9515295891e-4f);
  s = fma(s, z, floats(8.3321608736e-3f));
  s = fma(s, z, floats(-1.6666654611e-1f));
  s = fma(s * z, x, x);
  const U sign = words(0x80000000u), swap = words(1u << 22), turned = shl<8>(t);
  sin = view(bits(if_clear(t, swap, s, c)) ^ (turned & sign));
  cos = view(bits(if_clear(t, swap, c, s)) ^ (add(turned, words(1u << 30)) & sign));
}

// normal_ in groups of 16 words, 8 radii and 8 angles, with the cephes functions (torch with AVX2).
template <Dtype dtype>
struct Normal {
  using T = typename Element<dtype>::T;
  static constexpr uint32_t kItems = 2 * kPairs, kStepWords = 2 * kPairs;
  // Elements that cost as much as one that is picked out.
  static constexpr uint32_t kAllWorth = kSqueezes ? 200 : 40;
  F mean, std, lo, hi;

  explicit Normal(const FillDesc& d)
      : mean(floats(static_cast<float>(d.a))),
        std(floats(static_cast<float>(d.b))),
        lo(floats(static_cast<float>(d.lo))),
        hi(floats(static_cast<float>(d.hi))) {}

  FI_INLINE void pairs(const uint32_t* x, F& low, F& high) const {
    U a, b;
    load_pairs(x, a, b);
    of(a, b, low, high);
    join_pairs(low, high);
  }

  FI_INLINE void of(U a, U b, F& low, F& high) const {
    const U mask = words(0x00ffffffu);
    // With k of 24 bits: 1 - k / 2^24 is exact, and 2 pi * (k / 2^24) rounds as (2 pi / 2^24) * k.
    const F u1 = fnma(to_float(temper(a) & mask), floats(kUnit24), floats(1.0f));
    const U angle = temper(b) & mask;
    const F theta = to_float(angle) * floats(6.283185307179586f * kUnit24);
    const F radius = root(minus_2_log(u1));
    F sin, cos;
    sin_cos(angle, theta, sin, cos);
    low = fma(radius * cos, std, mean);
    high = fma(radius * sin, std, mean);
  }

  template <bool kStream>
  FI_INLINE void write(const uint32_t* x, T* out) const {
    for (int j = 0; j < kPairs; j += kLanes) {
      F low, high;
      pairs(x + j, low, high);
      Element<dtype>::template store<kStream>(out + j, Element<dtype>::coded(low),
                                              Element<dtype>::coded(high));
    }
  }

  FI_INLINE uint32_t write_and_test(const uint32_t* x, T* out) const {
    uint32_t result = 0;
    for (int j = 0; j < kPairs; j += kLanes) {
      F low, high;
      pairs(x + j, low, high);
      low = Element<dtype>::rounded(low);
      high = Element<dtype>::rounded(high);
      Element<dtype>::template store<false>(out + j, low, high);
      result |= lanes_outside(low, lo, hi) << j | lanes_outside(high, lo, hi) << (kPairs + j);
    }
    return result;
  }
};

// The same with libm's functions: double everywhere, float where torch has no AVX2 kernel.
template <Dtype dtype, class R>  // R: the type torch computes in
struct NormalLibm {
  using T = typename Element<dtype>::T;
  static constexpr uint32_t kItems = 16, kStepWords = 16 * sizeof(R) / 4;
  static constexpr uint32_t kAllWorth = 4;  // as above
  R mean, std;
  double lo, hi;

  explicit NormalLibm(const FillDesc& d)
      : mean(static_cast<R>(d.a)), std(static_cast<R>(d.b)), lo(d.lo), hi(d.hi) {}

  static FI_INLINE R unit(const uint32_t* w) {
    if (sizeof(R) == 8) return static_cast<R>(unit53(w));
    return static_cast<R>(w[0] & 0x00ffffff) * static_cast<R>(kUnit24);
  }

  FI_INLINE uint32_t write_and_test(const uint32_t* x, T* out) const {
    uint32_t w[kStepWords + Words::kPad];
    temper_all(x, w, kStepWords);
    uint32_t result = 0;
    for (uint32_t j = 0; j < 8; ++j) {
      const R u1 = 1 - unit(w + j * sizeof(R) / 4);
      const R u2 = unit(w + (j + 8) * sizeof(R) / 4);
      const R radius = std::sqrt(-2 * std::log(u1));
      const R theta = static_cast<R>(2.0f * 3.14159265358979323846 * u2);
      result |= set(out + j, std::fma(radius * std::cos(theta), std, mean)) << j;
      result |= set(out + j + 8, std::fma(radius * std::sin(theta), std, mean)) << (j + 8);
    }
    return result;
  }

  template <bool kStream>
  FI_INLINE void write(const uint32_t* x, T* out) const {
    write_and_test(x, out);
  }

  FI_INLINE uint32_t set(T* p, R v) const {
    set_element(p, dtype, v);
    const double r = sizeof(T) == 2 ? rounded_to(dtype, static_cast<float>(v)) : v;
    return r < lo || r > hi;
  }
};

// uniform_ in double: 53 of 64 bits, the first word is the high half.
template <bool kContract>
struct UniformDouble {
  using T = double;
  static constexpr uint32_t kItems = 16, kStepWords = 32;
  double from, to, range;

  explicit UniformDouble(const FillDesc& d)  // no value equals NaN
      : from(d.a), to(d.flavour & kKeepsEnd ? NAN : d.b), range(d.b - d.a) {}

  template <bool kStream>
  FI_INLINE void write(const uint32_t* x, double* out) const {
    uint32_t w[kStepWords + Words::kPad];
    temper_all(x, w, kStepWords);
    for (uint32_t j = 0; j < kItems; ++j) {
      const double u = unit53(w + 2 * j);
      const double v = kContract ? std::fma(u, range, from) : u * range + from;
      out[j] = v == to ? from : v;
    }
  }
};

// at::normal_distribution<double>: one pair from four words; torch hands out the cosine first.
FI_INLINE void normal_pair(const uint32_t* w, double& cosine, double& sine) {
  const double u1 = unit53(w), u2 = unit53(w + 2);
  const double r = std::sqrt(-2.0 * std::log1p(-u2));
  const double theta = 2.0 * 3.14159265358979323846 * u1;
  sine = r * std::sin(theta);
  cosine = r * std::cos(theta);
}
