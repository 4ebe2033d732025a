// SPDX-License-Identifier: BSD-3-Clause
// Polynomials over GF(2) modulo the characteristic polynomial of MT19937.

#include "jump.h"

#include <atomic>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <vector>

namespace fastinit {
namespace {

constexpr int kDegree = Jump::kDegree;
constexpr int kWords = Jump::kWords;  // 312; bit i of the array is the coefficient of t^i
constexpr size_t kCached = 64;        // 2.5 KB each
constexpr double kSquareCost = 80e3;  // ns, of polynomials with more than one term

// The exponents below 19937 of the characteristic polynomial, 134 of them (Matsumoto and Nishimura
// 1998, section 3.2): with A = t^624 + t^397 and B = t^623 + t^396,
//   A B^31 + sum over k < 31 of a_k A B^(30-k) + a_31,  a_k = bit k of 0x9908b0df.
std::vector<int> find_low_exponents() {
  std::vector<bool> term(kDegree + 1);
  const auto add_a_times_b_to_the = [&](int power) {
    for (int j = 0; j <= power; ++j) {
      if ((j & power) != j) continue;  // binomial coefficients modulo 2 (Lucas)
      const int b = 396 * power + 227 * j;
      term[b + 624].flip();
      term[b + 397].flip();
    }
  };
  add_a_times_b_to_the(31);
  for (int k = 0; k < 31; ++k) {
    if (0x9908b0dfu >> k & 1) add_a_times_b_to_the(30 - k);
  }
  if (0x9908b0dfu >> 31 & 1) term[0].flip();
  std::vector<int> exponents;
  for (int i = 0; i < kDegree; ++i) {
    if (term[i]) exponents.push_back(i);
  }
  return exponents;
}

const std::vector<int>& low_exponents() {
  static const std::vector<int> exponents = find_low_exponents();
  return exponents;
}

uint64_t spread(uint32_t v) {  // bit i -> bit 2i
  uint64_t x = v;
  x = (x | x << 16) & 0x0000ffff0000ffff;
  x = (x | x << 8) & 0x00ff00ff00ff00ff;
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
  x = (x | x << 2) & 0x3333333333333333;
  return (x | x << 1) & 0x5555555555555555;
}

class Power {
 public:
  Power() : p_() { p_[0] = 1; }
  explicit Power(const Jump& jump) { memcpy(p_, jump.term, sizeof p_); }

  void square() {
    uint64_t wide[2 * kWords + 4] = {};
    for (int i = 0; i < kWords; ++i) {
      wide[2 * i] = spread(static_cast<uint32_t>(p_[i]));
      wide[2 * i + 1] = spread(static_cast<uint32_t>(p_[i] >> 32));
    }
    // From the top, replace 192 bits at a time by their remainder. The second highest exponent of
    // the modulus is 227 below the highest, so they do not reach each other.
    const std::vector<int>& low = low_exponents();
    constexpr int kStep = 192;
    constexpr int kSteps = (kDegree + kStep - 1) / kStep;
    for (int step = kSteps - 1; step >= 0; --step) {
      const int from = kDegree + step * kStep, word = from / 64, shift = from % 64;
      uint64_t v[3];
      for (int i = 0; i < 3; ++i) {
        v[i] = wide[word + i] >> shift | wide[word + i + 1] << (64 - shift);
      }
      if ((v[0] | v[1] | v[2]) == 0) continue;  // small powers
      wide[word] &= (uint64_t{1} << shift) - 1;
      wide[word + 1] = wide[word + 2] = 0;
      wide[word + 3] = wide[word + 3] >> shift << shift;
      for (const int exponent : low) {
        const int at = step * kStep + exponent, s = at % 64;
        uint64_t* out = wide + at / 64;
        out[0] ^= v[0] << s;
        out[1] ^= v[1] << s | v[0] >> 1 >> (63 - s);
        out[2] ^= v[2] << s | v[1] >> 1 >> (63 - s);
        out[3] ^= v[2] >> 1 >> (63 - s);
      }
    }
    memcpy(p_, wide, sizeof p_);
  }

  void times_t() {
    for (int i = kWords - 1; i > 0; --i) p_[i] = p_[i] << 1 | p_[i - 1] >> 63;
    p_[0] <<= 1;
    const uint64_t top = uint64_t{1} << (kDegree % 64);
    if (p_[kWords - 1] & top) {
      p_[kWords - 1] ^= top;
      for (const int e : low_exponents()) p_[e / 64] ^= uint64_t{1} << (e % 64);
    }
  }

  std::shared_ptr<const Jump> jump(uint64_t distance) const {
    auto jump = std::make_shared<Jump>();
    jump->distance = distance;
    memcpy(jump->term, p_, sizeof p_);
    return jump;
  }

 private:
  uint64_t p_[kWords];
};

std::atomic<uint64_t> made{0};
std::mutex mutex;
std::list<std::shared_ptr<const Jump>> cache;  // most recent first
std::map<uint64_t, double> missed;             // what jumps that there are not would have saved

std::shared_ptr<const Jump> keep(std::shared_ptr<const Jump> jump) {
  std::lock_guard<std::mutex> lock(mutex);
  cache.push_front(jump);
  if (cache.size() > kCached) cache.pop_back();
  return jump;
}

std::shared_ptr<const Jump> find(uint64_t distance) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = cache.begin(); it != cache.end(); ++it) {
    if ((*it)->distance != distance) continue;
    cache.splice(cache.begin(), cache, it);
    return cache.front();
  }
  return nullptr;
}

}  // namespace

uint64_t jumps_made() { return made; }

bool jump_pays(uint64_t distance, double saves) {
  if (find(distance) != nullptr) return true;
  double cost = 0;
  for (uint64_t one_term = 1 << 14; one_term < distance; one_term *= 2) cost += kSquareCost;
  std::lock_guard<std::mutex> lock(mutex);
  if (missed.size() >= 4 * kCached) missed.clear();
  if ((missed[distance] += saves) < cost) return false;
  missed.erase(distance);
  return true;
}

std::shared_ptr<const Jump> make_jump(uint64_t distance) {
  ++made;
  if (auto jump = find(distance)) return jump;
  Power power;  // t^(distance - 1), binary digits from the top
  for (int bit = 63; bit >= 0; --bit) {
    if ((distance - 1) >> bit == 0) continue;
    power.square();
    if ((distance - 1) >> bit & 1) power.times_t();
  }
  return keep(power.jump(distance));
}

std::shared_ptr<const Jump> make_double(const Jump& jump) {
  ++made;
  if (auto known = find(2 * jump.distance)) return known;
  Power power(jump);  // t^(distance - 1), to t^(2 distance - 1)
  power.square();
  power.times_t();
  return keep(power.jump(2 * jump.distance));
}

}  // namespace fastinit
