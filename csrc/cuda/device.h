// SPDX-License-Identifier: BSD-3-Clause
// What the compiled kernels offer to the module.
#pragma once

#include "launch.h"

namespace fastinit {
namespace cuda {

struct Status {
  int code;             // of CUDA's runtime; 0: fine
  const char* message;  // what CUDA says about it
};

// Starts the kernel on a stream of a device, which has to be current, and does not wait for it.
Status launch(const Arguments& args, int device, uint64_t stream);

// Whether there is a driver with a GPU.
Status driver();

}  // namespace cuda
}  // namespace fastinit
