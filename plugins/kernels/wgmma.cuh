// y[M,N] = x[M,K] W[N,K]^T on wgmma.sp: W is the sparse operand A and comes, like x, from shared memory.
//
// A tile is y^T[rows, tokens]. The copy engine (TMA) fills two rings in shared memory,
//   weights  values [rows][64], 128 bytes a row, swizzled; metadata [rows/64] KiB, es24-v1 as it lies: 128 k a stage
//   x        [tokens][64], 128 bytes a row, swizzled: one or two of these, 64 or 128 k, a stage
// and zero fills what lies outside the tensors, so that any M, N % 8 and K % 32 need no other care. In 128 k,
// wgmma q = 0..3 multiplies k = 32q .. 32q+31. Its metadata operand in warp w of a warpgroup and lane 4g+t holds rows
// 16w+g and 16w+g+8, k half t&1: the word (r16 = w, h = t&1, g, q). Lanes t = 0, 1 supply it with selector 0, lanes
// t = 2, 3 with selector 1; as the four q are adjacent words, one 8-byte load a lane serves 128 k.
//
// Warp specialisation: in the last warpgroup one warp drives the copies of the weights, which depend on no other
// kernel, one those of x, which wait for the previous one, and two set up the rings (wgmma_feed.cuh); the others
// multiply (wgmma_consumer.cuh). A stage is handed back only when the wgmmas of the next one are under way, so the
// tensor cores never drain between stages.
//
// A cluster works on a block of share_x tiles along the rows (each CTA loads its part of the x tile and multicasts it
// to the others) times share_w along the tokens (the same for W), with K in `split` parts: the CTA of part p of the
// tile at (row, token) has the rank row + share_x (token + share_w p). The CTAs of a tile each own a share of its
// columns: they store their partial sums to the owners' shared memory, and the owners add them in a fixed order
// (wgmma_reduce.cuh). K is split where the tiles are too few to fill the GPU. Where it is not, the tiles that whole
// waves of blocks leave over are split over all CTAs of a cluster.
//
// Pingpong is for short K, where storing y takes a good part of the time: two warpgroups have a tile each, and one
// stores while the other multiplies.
#pragma once

#include "wgmma_feed.cuh"
#include "wgmma_reduce.cuh"

namespace esparse::wgmma {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLight ? 2 : 1) gemm(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace detail;
  extern __shared__ __align__(1024) char memory[];
  const Cta<Tile> cta(a, ptx::shared_address(memory));
  const int warp = threadIdx.x / 32;
  constexpr int kWeightsWarp = Tile::kConsumers / 32, kXWarp = kWeightsWarp + 1;

  ptx::griddepcontrol_launch_dependents();
  if (warp >= kWeightsWarp) {
    if constexpr (Tile::kHeavy) ptx::setmaxnreg_dec<Tile::kProducerRegisters>();
    if (warp == kWeightsWarp) {
      feed<WeightsCopies<Tile>>(cta);
    } else if (warp == kXWarp) {
      feed<XCopies<Tile>>(cta);
    } else if (warp == kXWarp + 1) {
      set_up<WeightsCopies<Tile>>(cta);
    } else {
      set_up<XCopies<Tile>>(cta);
    }
    __syncwarp();
    if (cta.splits() && a.exchange_in_ring) cluster_sync();
  } else {
    if constexpr (Tile::kHeavy) ptx::setmaxnreg_inc<Tile::kConsumerRegisters>();
    ptx::bar_sync(kSetUpBarrier, Tile::kConsumers + 64);
    if (!cta.alone()) ptx::barrier_cluster_arrive_relaxed();
    Consumer<Tile> consumer(cta);
    if (cta.log_tiles()) ptx::barrier_cluster_wait_acquire();
    for (uint32_t index = cta.cluster + consumer.turn * cta.clusters; index < cta.pieces();
         index += Tile::kTurns * cta.clusters) {
      const Work work = cta.work(index);
      consumer.begin(work);
      consumer.multiply(work, index + cta.clusters >= cta.pieces());
      if (!work.whole()) {
        if (!cta.log_tiles()) ptx::barrier_cluster_wait_acquire();  // nothing of the others was needed before
        if (a.exchange_in_ring) cluster_sync();
        reduce(consumer, work);
        if (cta.log_tiles()) ptx::barrier_cluster_arrive_relaxed();
      }
      consumer.store(work);
    }
  }
  // Until the others of the cluster neither copy to this one's shared memory nor arrive at its barriers. Where they
  // only exchange sums, it has waited for all that it receives.
  if (cta.log_tiles()) {
    __syncwarp();
    if (!cta.splits() || warp >= kWeightsWarp) ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait_acquire();
  }
#endif
}

}  // namespace esparse::wgmma
