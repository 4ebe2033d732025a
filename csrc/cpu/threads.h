// SPDX-License-Identifier: BSD-3-Clause
// Threads of one run, and how they hear of Ctrl-C.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "surface.h"

namespace fastinit {

constexpr double kThreadWorth = 150e3;  // ns of work that pay for starting a thread

inline int worth_threads(double cost, const Control& control) {
  const int worth = static_cast<int>(std::min(1e6, 1 + cost / kThreadWorth));
  return std::max(1, std::min(control.threads, worth));
}

// Runs body(0 ... threads - 1), body(0) on the calling thread, and passes an exception on. Threads
// are made for each run: that costs some 50 us each and leaves nothing behind that a fork could
// lose. Workers must not wait for each other: see Team in qr.h.
inline void parallel(int threads, const std::function<void(int)>& body) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(threads));
  const auto guarded = [&](int worker) {
    try {
      body(worker);
    } catch (...) {
      errors[static_cast<size_t>(worker)] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back(guarded, i);
    } catch (const std::system_error&) {  // no more threads to be had: do their part here
      for (int j = i; j < threads; ++j) guarded(j);
      break;
    }
  }
  guarded(0);
  for (std::thread& t : others) t.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Lets the calling thread (worker 0) ask for interruption, and the others hear of it.
class Interrupt {
 public:
  explicit Interrupt(const Control& control) : control_(control) {}
  bool raised(int worker) {
    if (worker == 0 && !stop_ && std::chrono::steady_clock::now() - last_ > kPeriod) {
      if (control_.interrupted()) stop_ = true;
      last_ = std::chrono::steady_clock::now();
    }
    return stop_;
  }

 private:
  static constexpr std::chrono::milliseconds kPeriod{50};
  const Control& control_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};
};

}  // namespace fastinit
