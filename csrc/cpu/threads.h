// SPDX-License-Identifier: BSD-3-Clause
// Threads of one run, and how they hear of Ctrl-C.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "surface.h"

namespace fastinit {

constexpr double kThreadWorth = 150e3;  // ns of work that pay for starting a thread

inline int worth_threads(double cost, const Control& control) {
  const int worth = static_cast<int>(std::min(1e6, 1 + cost / kThreadWorth));
  return std::max(1, std::min(control.threads, worth));
}

// Threads that are joined on every way out: a running one that is destroyed ends the process.
struct Joined {
  std::vector<std::thread> all;
  ~Joined() {
    for (std::thread& t : all) t.join();
  }
};

// Runs body(0 ... threads - 1), body(0) on the calling thread, and passes an exception on. Threads
// are made for each run: that costs some 50 us each and leaves nothing behind that a fork could
// lose. Workers must not wait for each other: see Team in qr.h.
inline void parallel(int threads, const std::function<void(int)>& body) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(threads));
  const auto guarded = [&](int worker) {
    try {
      body(worker);
    } catch (const std::exception&) {  // not `...`: the end of a thread may look like one
      errors[static_cast<size_t>(worker)] = std::current_exception();
    }
  };
  {
    Joined others;
    int next = 1;
    try {
      others.all.reserve(static_cast<size_t>(threads));
      for (; next < threads; ++next) others.all.emplace_back(guarded, next);
    } catch (const std::exception&) {  // no more threads, or no memory for them
    }
    guarded(0);
    for (; next < threads; ++next) guarded(next);
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Lets the calling thread ask for interruption, whose work it does, and the others hear of it.
class Interrupt {
 public:
  explicit Interrupt(const Control& control) : ask_(control.interrupted) {}
  bool raised() {
    if (ask_ != nullptr && std::this_thread::get_id() == asker_ && !stop_ &&
        std::chrono::steady_clock::now() - last_ > kPeriod) {
      if (ask_()) stop_ = true;
      last_ = std::chrono::steady_clock::now();
    }
    return stop_;
  }
  bool was_raised() const { return stop_; }

 private:
  static constexpr std::chrono::milliseconds kPeriod{50};
  bool (*const ask_)();
  const std::thread::id asker_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};
};

}  // namespace fastinit
