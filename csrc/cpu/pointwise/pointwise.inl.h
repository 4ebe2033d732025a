// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic in place. Plain loops: compilers make vectors of them, and no rounding depends on
// that.

template <class T>
void step(Arithmetic op, T number, T* x, int64_t n) {
  switch (op) {
    case Arithmetic::multiply:
      for (int64_t i = 0; i < n; ++i) x[i] *= number;
      break;
    case Arithmetic::divide:
      for (int64_t i = 0; i < n; ++i) x[i] /= number;
      break;
    case Arithmetic::add:
      for (int64_t i = 0; i < n; ++i) x[i] += number;
      break;
    case Arithmetic::at_least:
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] < number ? number : x[i];
      break;
    case Arithmetic::at_most:
      for (int64_t i = 0; i < n; ++i) x[i] = x[i] > number ? number : x[i];
      break;
    case Arithmetic::erfinv:
      break;  // of one function for all
  }
}

// Calls MKL's vmsErfInv or vmdErfInv in the mode that ATen's cpu/vml.h gives: high accuracy,
// denormals kept, errors ignored.
template <class T>
void erfinv(uint64_t function, T* x, int64_t n) {
  constexpr int64_t kMode = 0x2 | 0x140000 | 0x100;
  reinterpret_cast<void (*)(int, const T*, T*, int64_t)>(function)(static_cast<int>(n), x, x,
                                                                   kMode);
}

template <class T>
void steps(const PointwiseDesc& d, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 2048;  // stays in the L1 cache from step to step
  for (; begin < end; begin += kBlock) {
    T* x = reinterpret_cast<T*>(d.address) + begin;
    for (int k = 0; k < d.steps; ++k) {
      const int64_t n = std::min(kBlock, end - begin);
      if (d.op[k] == Arithmetic::erfinv) {
        erfinv(d.erfinv, x, n);
      } else {
        step(d.op[k], static_cast<T>(d.number[k]), x, n);
      }
    }
  }
}

void pointwise(const PointwiseDesc& d, int64_t begin, int64_t end) {
  if (d.dtype == Dtype::f64) {
    steps<double>(d, begin, end);
  } else {
    steps<float>(d, begin, end);
  }
}
