// SPDX-License-Identifier: BSD-3-Clause
// The kernels that make orthonormal columns: one for each step, and their launch.

#include "../device.h"
#include "large.h"

namespace fastinit {
namespace cuda {
namespace {

constexpr uint32_t kFewThreads = 64;  // of a block for a matrix of up to 16 columns
constexpr uint32_t kStepThreads = 256;
constexpr uint32_t kPanelThreads = 512;
constexpr uint32_t kSharedByDefault = 48 << 10;  // more has to be asked for

extern __shared__ double shared[];

template <class T>
__global__ void __launch_bounds__(kFewThreads)
    small_kernel(const __grid_constant__ QrArguments args) {
  orthonormalize_small<8, 2, T>(Block(), args, blockIdx.x, shared);
}

template <class T>
__global__ void __launch_bounds__(Medium<T>::kThreads, 1)
    medium_kernel(const __grid_constant__ QrArguments args) {
  orthonormalize_small<Medium<T>::kLanes, 4, T>(Block(), args, blockIdx.x, shared);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    pack_kernel(const __grid_constant__ QrArguments args) {
  pack<T>(Block(), args, blockIdx.y, blockIdx.x, shared);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    reflect_kernel(const __grid_constant__ QrArguments args) {
  reflect_columns<T>(Block(), args, blockIdx.y, blockIdx.x);
}

// Two blocks on a processor: for three, nvcc 13.0 would spill for RTX 50.
template <class T, bool streams>
__global__ void __launch_bounds__(kPanelThreads, 2)
    panel_kernel(const __grid_constant__ QrArguments args) {
  factor_panel<T, streams>(Block(), args, blockIdx.x, shared);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    triangle_kernel(const __grid_constant__ QrArguments args) {
  make_triangle<T>(Block(), args, blockIdx.y, blockIdx.x, shared);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    write_kernel(const __grid_constant__ QrArguments args) {
  write<T>(Block(), args, blockIdx.y, blockIdx.x, shared);
}

using Kernel = void (*)(QrArguments);

template <class T>
Kernel kernel_of(QrStep step, const QrArguments& args, uint32_t threads) {
  switch (step) {
    case QrStep::small:
      return threads <= kFewThreads ? small_kernel<T> : medium_kernel<T>;
    case QrStep::pack:
      return pack_kernel<T>;
    case QrStep::reflect:
      return reflect_kernel<T>;
    case QrStep::panel:
      return args.streams != 0 ? panel_kernel<T, true> : panel_kernel<T, false>;
    case QrStep::triangle:
      return triangle_kernel<T>;
    default:
      return write_kernel<T>;
  }
}

}  // namespace

Status launch_qr(QrStep step, const QrArguments& args, const QrGrid& grid, int device,
                 uint64_t stream) {
  // The caller has made the device current for torch's runtime; this one has its own idea of it.
  cudaError_t error = cudaSetDevice(device);
  const Kernel kernel = args.is_double != 0 ? kernel_of<double>(step, args, grid.threads)
                                            : kernel_of<float>(step, args, grid.threads);
  if (error == cudaSuccess && grid.shared > kSharedByDefault) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared));
  }
  if (error == cudaSuccess) {
    kernel<<<dim3(grid.x, grid.y), grid.threads, grid.shared,
             reinterpret_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would find it
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

Status most_shared(int device, int* bytes) {
  const cudaError_t error =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace fastinit
