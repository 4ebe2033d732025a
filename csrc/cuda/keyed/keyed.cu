// SPDX-License-Identifier: BSD-3-Clause
// The kernel of the keyed stream: a grid that stays, over the tiles of all fills of a launch.
// Compiled with -fmad=false: laws.inl.h says where two operations are rounded as one.

#include "../grid.h"
#include "units.h"

namespace fastinit {
namespace cuda {
namespace {

// 64 registers for four blocks of 256 are enough up to Hopper; nvcc 13.0 would spill for Blackwell.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerProcessor = 3;
#else
constexpr int kBlocksPerProcessor = 4;
#endif

// The fill that a block is at. In shared memory it costs the loops no registers.
struct Current {
  KeyedTiles tiles;
  keyed::Prepared prepared;
};

__device__ void load(const KeyedArguments& args, uint32_t tile, Current* now) {
  load_fill<kKeyedLanes>(args, tile, &now->tiles);
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

}  // namespace

Status launch_keyed(const KeyedArguments& args, int device, uint64_t stream) {
  static int resident[64] = {};
  return launch_grid(keyed_kernel, kKeyedLanes, resident, args, device, stream);
}

}  // namespace cuda
}  // namespace fastinit
