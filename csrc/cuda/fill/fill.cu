// SPDX-License-Identifier: BSD-3-Clause
// The kernel: a grid that stays, over the tiles of all fills of a launch.

#include "../grid.h"
#include "tiles.h"

namespace fastinit {
namespace cuda {
namespace {

// Registers are what limits it: 80 for three blocks of 256, which is enough up to Hopper; nvcc 13.0
// would spill for Blackwell.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerProcessor = 2;
#else
constexpr int kBlocksPerProcessor = 3;
#endif

// The block from which a fill counts. Tiles are handed out in order if any fill waits for another,
// so what is waited for is in the hands of blocks that run.
__device__ uint64_t origin_of(const FillTiles& f, const PhiloxSource& source,
                              const Progress* progress) {
  if (f.after < 0) return source.block;
  const volatile Slot* const slot = progress->slots + f.after;
  while (slot->ready == 0) __nanosleep(200);
  __threadfence();
  return slot->end;
}

__device__ void count_rounds(const FillTiles& f, Progress* progress, uint64_t origin,
                             uint32_t rounds) {
  Slot* const slot = progress->slots + f.slot;
  if (rounds != 0) atomicMax(&slot->rounds, rounds);
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(&slot->tiles_done, 1u) + 1 != f.slot_tiles) return;
  __threadfence();
  const uint64_t last = end_of(f, origin, atomicMax(&slot->rounds, 0u));
  *const_cast<volatile uint64_t*>(&slot->end) = last;
  __threadfence();
  atomicExch(&slot->ready, 1u);
}

__device__ uint32_t next_tile(Progress* progress, uint32_t tile) {
  if (progress == nullptr) return tile + gridDim.x;
  __shared__ uint32_t claimed;
  __syncthreads();
  if (threadIdx.x == 0) claimed = atomicAdd(&progress->next_tile, 1u);
  __syncthreads();
  return claimed;
}

// The fill that a block is at. In shared memory it costs the loops no registers.
struct Current {
  FillTiles fill;
  uint64_t seed, origin;
};

__device__ void load(const FillArguments& args, uint32_t tile, Progress* progress, Current* now) {
  load_fill<kFillLanes>(args, tile, &now->fill);
  if (threadIdx.x == 0) {
    const PhiloxSource& source = args.sources[now->fill.source];
    now->seed = source.seed;
    now->origin = origin_of(now->fill, source, progress);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kFillLanes, kBlocksPerProcessor)
    fill_kernel(const __grid_constant__ FillArguments args) {
  __shared__ Current now;
  Progress* const progress = reinterpret_cast<Progress*>(args.progress);
  if (threadIdx.x == 0) now.fill.first_tile = now.fill.tiles = 0;
  __syncthreads();
  uint32_t tile = progress == nullptr ? blockIdx.x : next_tile(progress, 0);
  for (; tile < args.tiles; tile = next_tile(progress, tile)) {
    if (tile - now.fill.first_tile >= now.fill.tiles) load(args, tile, progress, &now);
    const uint32_t rounds =
        write_tile(now.fill, now.seed, now.origin, tile - now.fill.first_tile, threadIdx.x);
    if (now.fill.op == Op::trunc_normal) count_rounds(now.fill, progress, now.origin, rounds);
  }
}

}  // namespace

Status launch_fill(const FillArguments& args, int device, uint64_t stream) {
  static int resident[64] = {};
  return launch_grid(fill_kernel, kFillLanes, resident, args, device, stream);
}

Status driver() {
  int version = 0, count = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess && version == 0) return {-1, "no driver"};
  const cudaError_t error = cudaGetDeviceCount(&count);
  return {static_cast<int>(error), error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace fastinit
