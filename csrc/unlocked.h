// SPDX-License-Identifier: BSD-3-Clause
// Work without Python's lock. For the files module.cpp, which have included Python before.
#pragma once

#include <chrono>
#include <exception>
#include <thread>

namespace fastinit {

// Takes Python's lock again. If the interpreter has ended meanwhile, Python up to 3.13 ends the
// thread (a daemon) there, unwinding its stack; py::gil_scoped_release, which takes the lock in its
// destructor, aborts the process then, and so does what gives back references above. As in Python
// 3.14, the thread stays where it is until the process has ended.
inline void lock_again(PyThreadState* thread) {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Returns what the work returns.
template <class Work>
auto unlocked(const Work& work) {
  decltype(work()) done{};
  std::exception_ptr error;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    done = work();
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  lock_again(thread);
  if (error) std::rethrow_exception(error);
  return done;
}

}  // namespace fastinit
