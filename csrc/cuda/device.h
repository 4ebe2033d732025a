// SPDX-License-Identifier: BSD-3-Clause
// What the compiled kernels offer to the module.
#pragma once

#include "keyed/launch.h"
#include "fill/launch.h"
#include "qr/launch.h"

namespace fastinit {
namespace cuda {

struct Status {
  int code;             // of CUDA's runtime; 0: fine
  const char* message;  // what CUDA says about it
};

// Starts the kernel on a stream of a device, which has to be current, and does not wait for it.
Status launch_fill(const FillArguments& args, int device, uint64_t stream);

// Starts the kernel of the keyed stream, likewise.
Status launch_keyed(const KeyedArguments& args, int device, uint64_t stream);

// Starts a step towards orthonormal columns, likewise.
Status launch_qr(QrStep step, const QrArguments& args, const QrGrid& grid, int device,
                 uint64_t stream);

// Bytes of shared memory that a block can ask for.
Status most_shared(int device, int* bytes);

// Whether there is a driver with a GPU.
Status driver();

}  // namespace cuda
}  // namespace fastinit
