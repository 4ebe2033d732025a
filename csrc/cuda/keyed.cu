// SPDX-License-Identifier: BSD-3-Clause
// The kernel of the keyed stream: a grid that stays, over the tiles of all fills of a launch.
// Compiled with -fmad=false: laws.inl.h says where two operations are rounded as one.

#include "device.h"
#include "keyed.h"

namespace fastinit {
namespace cuda {
namespace {

// 64 registers for four blocks of 256 are enough up to Hopper; nvcc 13.0 would spill for Blackwell.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerProcessor = 3;
#else
constexpr int kBlocksPerProcessor = 4;
#endif

// The last of `count` fills whose first tile is not behind `tile`. All lanes of a block take part.
__device__ uint32_t find(const KeyedTiles* fills, uint32_t count, uint32_t tile) {
  uint32_t begin = 0;
  while (count > 1) {
    const uint32_t step = (count + kKeyedLanes - 1) / kKeyedLanes;
    const uint32_t mine = threadIdx.x * step;
    const bool before = mine < count && fills[begin + mine].first_tile <= tile;
    const uint32_t chosen = (__syncthreads_count(before) - 1) * step;
    begin += chosen;
    count = min(step, count - chosen);
  }
  return begin;
}

// The fill that a block is at. In shared memory it costs the loops no registers.
struct Current {
  KeyedTiles tiles;
  keyed::Prepared prepared;
};

__device__ void load(const KeyedArguments& args, uint32_t tile, Current* now) {
  const KeyedTiles* const fills =
      args.table != 0 ? reinterpret_cast<const KeyedTiles*>(args.table) : args.inlined;
  const uint64_t* const from =
      reinterpret_cast<const uint64_t*>(fills + find(fills, args.fills, tile));
  __syncthreads();  // all lanes are done with the fill before
  if (threadIdx.x < sizeof(KeyedTiles) / 8) {
    reinterpret_cast<uint64_t*>(&now->tiles)[threadIdx.x] = from[threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x == 0) prepare(now->tiles.fill, &now->prepared);
  __syncthreads();
}

__global__ void __launch_bounds__(kKeyedLanes, kBlocksPerProcessor)
    keyed_kernel(const __grid_constant__ KeyedArguments args) {
  __shared__ Current now;
  if (threadIdx.x == 0) now.tiles.first_tile = now.tiles.tiles = 0;
  __syncthreads();
  for (uint32_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    if (tile - now.tiles.first_tile >= now.tiles.tiles) load(args, tile, &now);
    write_tile(now.tiles, now.prepared, tile - now.tiles.first_tile, threadIdx.x);
  }
}

int resident_blocks(int device, cudaError_t* error) {
  int per_processor = 0, processors = 0;
  *error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, keyed_kernel, kKeyedLanes, 0);
  if (*error != cudaSuccess) return 0;
  *error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return per_processor * processors;
}

}  // namespace

Status launch_keyed(const KeyedArguments& args, int device, uint64_t stream) {
  static int resident[64] = {};  // racing threads write the same
  // The caller has made the device current for torch's runtime; this one has its own idea of it.
  cudaError_t error = cudaSetDevice(device);
  const bool noted = device >= 0 && device < 64;
  int blocks = noted ? resident[device] : 0;
  if (error == cudaSuccess && blocks == 0) {
    blocks = resident_blocks(device, &error);
    if (noted) resident[device] = blocks;
  }
  if (error == cudaSuccess && args.tiles != 0) {
    if (static_cast<uint32_t>(blocks) > args.tiles) blocks = static_cast<int>(args.tiles);
    keyed_kernel<<<blocks, kKeyedLanes, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would find it
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace fastinit
