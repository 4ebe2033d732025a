// SPDX-License-Identifier: BSD-3-Clause
// A grid that stays, over the tiles of all fills of a launch: where a tile belongs, how many
// blocks.
#pragma once

#include "device.h"

namespace fastinit {
namespace cuda {

// The last of `count` fills whose first tile is not behind `tile`. All lanes of a block take part.
template <uint32_t kThreads, class Fill>
__device__ uint32_t find(const Fill* fills, uint32_t count, uint32_t tile) {
  uint32_t begin = 0;
  while (count > 1) {
    const uint32_t step = (count + kThreads - 1) / kThreads;
    const uint32_t mine = threadIdx.x * step;
    const bool before = mine < count && fills[begin + mine].first_tile <= tile;
    const uint32_t chosen = (__syncthreads_count(before) - 1) * step;
    begin += chosen;
    count = min(step, count - chosen);
  }
  return begin;
}

// Copies the fill that a tile is of into shared memory, for all lanes of a block.
template <uint32_t kThreads, class Args, class Fill>
__device__ void load_fill(const Args& args, uint32_t tile, Fill* to) {
  const Fill* const fills =
      args.table != 0 ? reinterpret_cast<const Fill*>(args.table) : args.inlined;
  const uint64_t* const from =
      reinterpret_cast<const uint64_t*>(fills + find<kThreads>(fills, args.fills, tile));
  __syncthreads();  // all lanes are done with the fill before
  if (threadIdx.x < sizeof(Fill) / 8) {
    reinterpret_cast<uint64_t*>(to)[threadIdx.x] = from[threadIdx.x];
  }
  __syncthreads();
}

template <class Args>
int resident_blocks(void (*kernel)(Args), int threads, int device, cudaError_t* error) {
  int per_processor = 0, processors = 0;
  *error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0);
  if (*error != cudaSuccess) return 0;
  *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return per_processor * processors;
}

// `resident`: of 64 devices, how many blocks fit; racing threads write the same.
template <class Args>
Status launch_grid(void (*kernel)(Args), int threads, int* resident, const Args& args, int device,
                   uint64_t stream) {
  // The caller has made the device current for torch's runtime; this one has its own idea of it.
  cudaError_t error = cudaSetDevice(device);
  const bool noted = device >= 0 && device < 64;
  int blocks = noted ? resident[device] : 0;
  if (error == cudaSuccess && blocks == 0) {
    blocks = resident_blocks(kernel, threads, device, &error);
    if (noted) resident[device] = blocks;
  }
  if (error == cudaSuccess && args.tiles != 0) {
    if (static_cast<uint32_t>(blocks) > args.tiles) blocks = static_cast<int>(args.tiles);
    kernel<<<blocks, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would find it
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace fastinit
