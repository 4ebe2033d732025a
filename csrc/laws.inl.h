// SPDX-License-Identifier: BSD-3-Clause
// The laws of the keyed stream: from the words of Philox blocks to elements. One text for every CPU
// target and for CUDA, in the vocabulary of lanes_*.h; docs/reproducibility.md has the definitions.
//
// Only IEEE operations with one rounding each, in a fixed order, so that all give the same bits.

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Blocks of one
// key; `high`: their upper halves, of which a loop need compute little if they stay the same;
// `domain` 0 is for values. w[j]: word j of each.
FI_LAW void philox(uint64_t key, W block, W high, uint32_t domain, W* w) {
  constexpr uint32_t kA = 0xD2511F53, kB = 0xCD9E8D57, kC = 0x9E3779B9, kD = 0xBB67AE85;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  const uint64_t first = uint64_t{domain} * kB;  // what is the same for all blocks
  W p0 = product(block, kA), p1 = all(first), c1 = high, c3 = all(0);
  W c0 = mix(upper(p1), c1, k0), c2 = mix(upper(p0), c3, k1);
  for (int round = 1; round < 10; ++round) {
    c1 = p1;
    c3 = p0;
    k0 += kC;
    k1 += kD;
    p0 = product(c0, kA);
    p1 = product(c2, kB);
    c0 = mix(upper(p1), c1, k0);
    c2 = mix(upper(p0), c3, k1);
  }
  w[0] = c0;
  w[1] = p1;
  w[2] = c2;
  w[3] = p0;
}

// ---- float32 --------------------------------------------------------------------------------

// A word as u = (w + 1/2) / 2^32, from the word as a signed number: small u and small 1 - u both
// have all their digits.
struct Unit {
  M is_upper;  // u = 1 + y, otherwise u = y
  F y;         // between -1/2 and 1/2
  FI_LAW explicit Unit(U w) : is_upper(bit<31>(w)) {
    y = fma(to_float(w), floats(0x1p-32f), floats(0x1p-33f));
  }
};

FI_LAW U exponent_of(F x) {  // e 2^23 for x = 2^e (1 + f) with |f| at most 1/3
  return sub(bits(x), words(0x3F2AAAAB)) & words(0xFF800000);
}

// -2 ln(2^e (1 + f)) of h = -2 f. What the sum loses goes to `rest`.
FI_LAW F minus_two_log(U exponent, F h, F* rest) {
  F q = floats(0x1.07f7dap-12f);  // within 0.1 * 2^-24 of the logarithm
  q = fma(q, h, floats(0x1.1e73a2p-11f));
  q = fma(q, h, floats(0x1.f317dep-11f));
  q = fma(q, h, floats(0x1.1ed424p-9f));
  q = fma(q, h, floats(0x1.559d8ap-8f));
  q = fma(q, h, floats(0x1.99d05ep-7f));
  q = fma(q, h, floats(0x1.fffef2p-6f));
  q = fma(q, h, floats(0x1.555506p-4f));
  q = fma(q, h, floats(0x1.0p-2f));
  const F p = fma(q, mul(h, h), h), e = to_float(exponent), ln2 = floats(0x1.62e43p-23f);
  const F sum = fnma(e, ln2, p);
  *rest = minus(p, fma(e, ln2, sum));
  return sum;
}

// Two standard normals, sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v): Box and Muller (1958). u from word
// r, v from word a.
FI_LAW void normals(U r, U a, F* z0, F* z1) {
  const Unit u(r);
  const U exponent = exponent_of(plus_if(u.is_upper, floats(1.0f), u.y));
  // h = -2 (2^-e u - 1), exact.
  const F scale = view(sub(words(0xC0000000), exponent));  // -2 * 2^-e
  const F h = fma(u.y, scale, plus_if(u.is_upper, scale, floats(2.0f)));
  F rest;
  const F square = minus_two_log(exponent, h, &rest);
  const F radius = root(square);
  // What the root has lost: (square - radius^2) / (2 radius), the reciprocal to four bits.
  const F missing = plus(rest, fnma(radius, radius, square));
  const F low = mul(missing, view(sub(words(0x7E7311C7), bits(radius))));

  // Quarter turns: a = quarter 2^30 + n, t = (n + 1/2) / 2^30, between -1/2 and 1/2.
  const U turned = add(a, words(0x20000000));
  const F t = fma(to_float(shl<2>(a)), floats(0x1p-32f), floats(0x1p-31f)), tt = mul(t, t);
  F s = floats(-0x1.2ddcecp-8f);  // sin(pi/2 t) / t - float(pi/2)
  s = fma(s, tt, floats(0x1.46607ep-4f));
  s = fma(s, tt, floats(-0x1.4abbcp-1f));
  s = fma(s, tt, floats(-0x1.777a5cp-25f));
  const F sine = fma(t, floats(0x1.921fb6p+0f), mul(t, s));
  F c = floats(0x1.d45bfcp-11f);  // (cos(pi/2 t) - 1) / t^2
  c = fma(c, tt, floats(-0x1.55b112p-6f));
  c = fma(c, tt, floats(0x1.03c1aep-2f));
  c = fma(c, tt, floats(-0x1.3bd3ccp+0f));
  const F across = plus(radius, fma(radius, mul(c, tt), low)),
          up = fma(radius, sine, mul(low, sine));
  const M is_odd = bit<30>(turned);
  *z0 = flip(either(is_odd, up, across), add(turned, words(0x40000000)));
  *z1 = flip(either(is_odd, across, up), turned);
}

struct KeyedUniform {
  F from, unit, below;
  FI_LAW explicit KeyedUniform(const double* p) {
    const float a = static_cast<float>(p[0]);
    from = floats(a);
    unit = floats((static_cast<float>(p[1]) - a) * 0x1p-24f);
    below = floats(static_cast<float>(p[2]));
  }
  FI_LAW F of(U w) const { return smaller(fma(to_float(w & words(0xFFFFFF)), unit, from), below); }
  FI_LAW void operator()(U a, U b, F* x, F* y) const {
    *x = of(a);
    *y = of(b);
  }
};

struct KeyedNormal {
  F mean, std;
  FI_LAW explicit KeyedNormal(const double* p)
      : mean(floats(static_cast<float>(p[0]))), std(floats(static_cast<float>(p[1]))) {}
  FI_LAW void operator()(U a, U b, F* x, F* y) const {
    normals(a, b, x, y);
    *x = fma(*x, std, mean);
    *y = fma(*y, std, mean);
  }
};

// By the inverse of the distribution, rational approximations in the way of Wichura's algorithm
// AS 241 (1988): one draw per element, so nothing is rejected and no element knows of another.
struct KeyedTruncated {
  F mean, std, lo, hi, under, inside, over;
  FI_LAW explicit KeyedTruncated(const double* p)
      : mean(floats(static_cast<float>(p[0]))),
        std(floats(static_cast<float>(p[1]))),
        lo(floats(static_cast<float>(p[2]))),
        hi(floats(static_cast<float>(p[3]))),
        under(floats(static_cast<float>(p[4]))),
        inside(floats(static_cast<float>(p[5]))),
        over(floats(static_cast<float>(p[6]))) {}
  FI_LAW F of(U w) const {
    const Unit u(w);
    const F from_lo = plus_if(u.is_upper, floats(1.0f), u.y);
    const F from_hi = minus(either(u.is_upper, floats(0.0f), floats(1.0f)), u.y);
    // How much lies below the value and above it; the smaller one has all its digits.
    const F p = fma(from_lo, inside, under), q = fma(from_hi, inside, over), t = smaller(p, q);
    const F d = minus(floats(0.5f), t), s = fnma(d, d, floats(0.180625f));
    F n0 = floats(0x1.d8d4c4p+5f), m0 = floats(0x1.0cbbp+6f);  // z / d
    n0 = fma(n0, s, floats(0x1.3e913cp+7f));
    m0 = fma(m0, s, floats(0x1.3b04ep+6f));
    n0 = fma(n0, s, floats(0x1.93779p+5f));
    m0 = fma(m0, s, floats(0x1.1e518ap+4f));
    n0 = mul(fma(n0, s, floats(0x1.b18d9p+1f)), d);
    m0 = fma(m0, s, floats(1.0f));
    const U exponent = exponent_of(t);
    F low;
    const F h = fma(t, view(sub(words(0xC0000000), exponent)), floats(2.0f));
    const F square = mul(minus_two_log(exponent, h, &low), floats(0.5f));
    const F r = minus(root(square), floats(1.6f));
    F n1 = floats(0x1.f56daap-6f), m1 = floats(0x1.627b52p-6f);
    n1 = fma(n1, r, floats(0x1.d4526cp-2f));
    m1 = fma(m1, r, floats(0x1.281ca6p-2f));
    n1 = fma(n1, r, floats(0x1.ff309ap+0f));
    m1 = fma(m1, r, floats(0x1.001448p+0f));
    n1 = fma(n1, r, floats(0x1.90d91ap+1f));
    m1 = fma(m1, r, floats(1.0f));
    n1 = fma(n1, r, floats(0x1.6c666p+0f));
    const F edge = floats(0.075f);
    const F z = quotient(if_less(edge, t, n0, n1), if_less(edge, t, m0, m1));
    const F value = fma(if_less(q, p, z, flip(z, words(0x80000000))), std, mean);
    return larger(smaller(value, hi), lo);
  }
  FI_LAW void operator()(U a, U b, F* x, F* y) const {
    *x = of(a);
    *y = of(b);
  }
};

// ---- float64 --------------------------------------------------------------------------------

struct Unit64 {  // as Unit, of 53 bits and exact
  double y;
  bool is_upper;
  FI_LAW explicit Unit64(uint64_t k) {
    is_upper = k >> 63 != 0;
    y = fma(to_double((is_upper ? ~k : k) >> 11), 0x1p-53, 0x1p-54);
  }
};

// ln(2^-e (scale x)) as hi + lo; the polynomial is that of Sun's fdlibm, e_log.c.
FI_LAW double log_of(double x, double y, bool is_upper, double* lo) {
  // scale x - 1 is between sqrt(1/2) - 1 and sqrt(2) - 1, and exact.
  const uint64_t high = (bits64(x) - 0x3FE6A09E667F3BCDu) & 0xFFF0000000000000u;
  const double scale = view64(0x3FF0000000000000u - high);
  const double f = is_upper ? fma(-y, scale, scale - 1) : fma(y, scale, -1.0);
  const double e = to_double_signed(static_cast<int64_t>(high) >> 52);
  const double s = f / (2 + f), z = s * s;
  double p = 1.479819860511658591e-01;
  p = fma(p, z, 1.531383769920937332e-01);
  p = fma(p, z, 1.818357216161805012e-01);
  p = fma(p, z, 2.222219843214978396e-01);
  p = fma(p, z, 2.857142874366239149e-01);
  p = fma(p, z, 3.999999999940941908e-01);
  p = fma(p, z, 6.666666666666735130e-01);
  const double half = 0.5 * f * f;
  const double small = fma(s, fma(p, z, half), e * 1.90821492927058770002e-10) - half;
  const double big = e * 6.93147180369123816490e-01, sum = big + f;  // exact product
  const double t = (f - (sum - big)) + small;
  const double hi = sum + t;
  *lo = t - (hi - sum);
  return hi;
}

// As above: sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v), u from r and v from a.
FI_LAW void normals(uint64_t r, uint64_t a, double* z0, double* z1) {
  const Unit64 u(r);
  double low;
  const double log = log_of(u.is_upper ? 1 - u.y : u.y, u.y, u.is_upper, &low);
  const double square = -2 * log, radius = root(square);
  const double rest = fma(-2.0, low, fma(-radius, radius, square)) / (2 * radius);
  // n / 2^52 of a turn and half a unit more: a quarter is 2^51 units.
  const uint64_t n = a >> 11, quarter = (n + (uint64_t{1} << 50)) >> 51;
  const int64_t m = static_cast<int64_t>(n << 13) >> 13;  // 51 bits with sign
  const double t = fma(to_double_signed(m), 0x1p-51, 0x1p-52), tt = t * t;
  // Taylor's series of sin(pi/2 t) / t and (cos(pi/2 t) - 1) / t^2; |t| is at most 1/2.
  double s = 6.0669357311061957e-12;
  s = fma(s, tt, -6.6880351098114672e-10);
  s = fma(s, tt, 5.6921729219679268e-08);
  s = fma(s, tt, -3.5988432352120853e-06);
  s = fma(s, tt, 1.6044118478735982e-04);
  s = fma(s, tt, -4.6817541353186881e-03);
  s = fma(s, tt, 7.9692626246167045e-02);
  s = fma(s, tt, -6.4596409750624625e-01);
  s = fma(s, tt, 6.1232339957367659e-17);
  const double sine = fma(t, 1.5707963267948966, t * s);
  double c = 6.5659631149794724e-11;
  c = fma(c, tt, -6.3866030837918522e-09);
  c = fma(c, tt, 4.7108747788181715e-07);
  c = fma(c, tt, -2.5202042373060605e-05);
  c = fma(c, tt, 9.1926027483942658e-04);
  c = fma(c, tt, -2.0863480763352961e-02);
  c = fma(c, tt, 2.5366950790104801e-01);
  c = fma(c, tt, -1.2337005501361698e+00);
  const double across = radius + fma(radius, c * tt, rest), up = fma(radius, sine, rest * sine);
  const double first = (quarter & 1) != 0 ? up : across, second = (quarter & 1) != 0 ? across : up;
  *z0 = ((quarter + 1) & 2) != 0 ? -first : first;
  *z1 = (quarter & 2) != 0 ? -second : second;
}

struct KeyedUniform64 {
  double from, range, below;
  FI_LAW explicit KeyedUniform64(const double* p) : from(p[0]), range(p[1] - p[0]), below(p[2]) {}
  FI_LAW double of(uint64_t k) const {
    const double x = to_double(k & 0x1FFFFFFFFFFFFFu) * 0x1p-53;
    const double value = fma(x, range, from);
    return value < below ? value : below;
  }
  FI_LAW void operator()(uint64_t a, uint64_t b, double* x, double* y) const {
    *x = of(a);
    *y = of(b);
  }
};

struct KeyedNormal64 {
  double mean, std;
  FI_LAW explicit KeyedNormal64(const double* p) : mean(p[0]), std(p[1]) {}
  FI_LAW void operator()(uint64_t a, uint64_t b, double* x, double* y) const {
    normals(a, b, x, y);
    *x = fma(*x, std, mean);
    *y = fma(*y, std, mean);
  }
};

struct KeyedTruncated64 {
  double mean, std, lo, hi, under, inside, over;
  FI_LAW explicit KeyedTruncated64(const double* p)
      : mean(p[0]), std(p[1]), lo(p[2]), hi(p[3]), under(p[4]), inside(p[5]), over(p[6]) {}
  template <int n>
  static FI_LAW double at(const double (&c)[n], double x) {
    double y = c[n - 1];
    for (int i = n - 2; i >= 0; --i) y = fma(y, x, c[i]);
    return y;
  }
  // Wichura's PPND16: -P^-1(t), t at most 1/2.
  static FI_LAW double deviate(double t) {
    const double d = 0.5 - t;
    if (d <= 0.425) {
      constexpr double n[8] = {3.3871328727963666080e0, 1.3314166789178437745e2,
                               1.9715909503065514427e3, 1.3731693765509461125e4,
                               4.5921953931549871457e4, 6.7265770927008700853e4,
                               3.3430575583588128105e4, 2.5090809287301226727e3};
      constexpr double m[8] = {1.0,
                               4.2313330701600911252e1,
                               6.8718700749205790830e2,
                               5.3941960214247511077e3,
                               2.1213794301586595867e4,
                               3.9307895800092710610e4,
                               2.8729085735721942674e4,
                               5.2264952788528545610e3};
      const double s = fma(-d, d, 0.180625);
      return d * at(n, s) / at(m, s);
    }
    double low;
    const double log = log_of(t, t, false, &low), r = root(-log);
    if (r <= 5) {
      constexpr double n[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                               5.76949722146069140550e0,  3.64784832476320460504e0,
                               1.27045825245236838258e0,  2.41780725177450611770e-1,
                               2.27238449892691845833e-2, 7.74545014278341407640e-4};
      constexpr double m[8] = {1.0,
                               2.05319162663775882187e0,
                               1.67638483018380384940e0,
                               6.89767334985100004550e-1,
                               1.48103976427480074590e-1,
                               1.51986665636164571966e-2,
                               5.47593808499534494600e-4,
                               1.05075007164441684324e-9};
      return at(n, r - 1.6) / at(m, r - 1.6);
    }
    constexpr double n[8] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                             1.78482653991729133580e0,  2.96560571828504891230e-1,
                             2.65321895265761230930e-2, 1.24266094738807843860e-3,
                             2.71155556874348757815e-5, 2.01033439929228813265e-7};
    constexpr double m[8] = {1.0,
                             5.99832206555887937690e-1,
                             1.36929880922735805310e-1,
                             1.48753612908506148525e-2,
                             7.86869131145613259100e-4,
                             1.84631831751005468180e-5,
                             1.42151175831644588870e-7,
                             2.04426310338993978564e-15};
    return at(n, r - 5) / at(m, r - 5);
  }
  FI_LAW double of(uint64_t k) const {
    const Unit64 u(k);
    const double p = fma(u.is_upper ? 1 - u.y : u.y, inside, under);
    const double q = fma(u.is_upper ? u.y : 1 - u.y, inside, over);
    const double z = deviate(p < q ? p : q);
    const double value = fma(q < p ? z : -z, std, mean);
    return value < lo ? lo : value > hi ? hi : value;
  }
  FI_LAW void operator()(uint64_t a, uint64_t b, double* x, double* y) const {
    *x = of(a);
    *y = of(b);
  }
};
