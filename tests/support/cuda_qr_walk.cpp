// SPDX-License-Identifier: BSD-3-Clause
// The bodies of the kernels for orthonormal columns, compiled for the host: block after block,
// phase after phase, thread after thread.

#include <cstdint>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/qr/large.h"

using namespace fastinit::cuda;

namespace {

uint64_t bytes_stored = 0;  // of results
constexpr uint32_t kGuard = 64;
constexpr unsigned char kUnset = 0xFF;  // what shared memory is full of: not-a-number

template <class T>
void step_of(const Block& block, QrStep step, const QrArguments& args, uint32_t x, uint32_t y,
             void* shared) {
  switch (step) {
    case QrStep::small:
      if (block.threads() <= 64) return orthonormalize_small<8, 2, T>(block, args, x, shared);
      return orthonormalize_small<Medium<T>::kLanes, 4, T>(block, args, x, shared);
    case QrStep::pack:
      return pack<T>(block, args, y, x, shared);
    case QrStep::reflect:
      return reflect_columns<T>(block, args, y, x);
    case QrStep::panel:
      if (args.streams != 0) return factor_panel<T, true>(block, args, x, shared);
      return factor_panel<T, false>(block, args, x, shared);
    case QrStep::triangle:
      return make_triangle<T>(block, args, y, x, shared);
    case QrStep::write:
      return write<T>(block, args, y, x, shared);
  }
}

}  // namespace

void fastinit::cuda::written(uint64_t, uint64_t bytes) { bytes_stored += bytes; }

extern "C" {

// As csrc/cuda/qr/qr.cu launches it. Blocks come in the threads' order, which see Block. 1:
// something was written behind the shared memory that was asked for.
int walk_qr(uint32_t step, const void* packed, uint32_t size, uint32_t x, uint32_t y,
            uint32_t threads, uint32_t shared, int order) {
  QrArguments args = {};
  memcpy(&args, packed, size);
  const Block block(threads, order);
  for (uint32_t n = 0; n < x * y; ++n) {
    const uint32_t number = order == 0 ? n : x * y - 1 - n;
    std::vector<double> memory((shared + kGuard + 7) / 8);
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(memory.data());
    memset(bytes, kUnset, shared + kGuard);
    if (args.is_double != 0) {
      step_of<double>(block, static_cast<QrStep>(step), args, number % x, number / x, bytes);
    } else {
      step_of<float>(block, static_cast<QrStep>(step), args, number % x, number / x, bytes);
    }
    for (uint32_t i = shared; i < shared + kGuard; ++i) {
      if (bytes[i] != kUnset) return 1;
    }
  }
  return 0;
}

uint64_t count_bytes_stored() {
  const uint64_t n = bytes_stored;
  bytes_stored = 0;
  return n;
}

int size_of_job() { return sizeof(QrJob); }
int size_of_arguments() { return sizeof(QrArguments); }
}
