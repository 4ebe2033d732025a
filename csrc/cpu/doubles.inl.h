// SPDX-License-Identifier: BSD-3-Clause
// What laws.inl.h says of doubles, one at a time. Compiled once per target.

FI_INLINE double fma(double a, double b, double c) { return std::fma(a, b, c); }
FI_INLINE double root(double v) { return std::sqrt(v); }
FI_INLINE double to_double(uint64_t v) { return static_cast<double>(static_cast<int64_t>(v)); }
FI_INLINE double to_double_signed(int64_t v) { return static_cast<double>(v); }
FI_INLINE uint64_t bits64(double v) {
  uint64_t u;
  memcpy(&u, &v, 8);
  return u;
}
FI_INLINE double view64(uint64_t u) {
  double v;
  memcpy(&v, &u, 8);
  return v;
}
