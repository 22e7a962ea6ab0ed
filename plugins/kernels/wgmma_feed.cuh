// The warps of the wgmma.sp GEMM that set up the two rings and keep them full, two for each.
#pragma once

#include "wgmma_pipeline.cuh"

namespace esparse::wgmma::detail {

// The copies of a stage of weights, 128 k from `k` on: the rows of this CTA's tile, or of a row of tiles its share for
// all of them.
template <class Tile>
struct WeightsCopies {
  static constexpr int kStep = 128, kRing = 0;
  const Cta<Tile>& cta;

  __device__ Ring ring() const { return cta.weights(); }
  __device__ int log_sharing() const { return cta.log_share_w(); }
  __device__ bool waits() const { return false; }

  __device__ void local(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int rows = Tile::kRows >> cta.log_share_w();
    for (int first = 0; first < Tile::kRows; first += rows) {
      const int n = work.row0 + first;
      ptx::cp_async_bulk_tensor_2d(ring.here() + first * 128, &a.values, k >> 1, n, ring.full_here(), a.weight_policy);
      ptx::cp_async_bulk_tensor_3d(ring.here() + Tile::kRows * 128 + first * 16, &a.metadata, 0, n >> 6, k >> 7,
                                   ring.full_here(), a.weight_policy);
    }
  }
  __device__ void multicast(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int first = (Tile::kRows >> cta.log_share_w()) * cta.token(), n = work.row0 + first;
    uint16_t ctas = 0;
    for (int token = 0; token < cta.share_w(); ++token) ctas |= 1 << cta.beside(cta.row(), token);
    ptx::cp_async_bulk_tensor_2d_multicast(ring.here() + first * 128, &a.values, k >> 1, n, ring.full_here(), ctas,
                                           a.weight_policy);
    ptx::cp_async_bulk_tensor_3d_multicast(ring.here() + Tile::kRows * 128 + first * 16, &a.metadata, 0, n >> 6, k >> 7,
                                           ring.full_here(), ctas, a.weight_policy);
  }
};

// The same of x.
template <class Tile>
struct XCopies {
  static constexpr int kStep = 64 * Tile::kXBoxes, kRing = 1;
  const Cta<Tile>& cta;

  __device__ Ring ring() const { return cta.x(); }
  __device__ int log_sharing() const { return cta.log_share_x(); }
  __device__ bool waits() const { return cta.a.programmatic; }  // for the previous kernel

  __device__ void local(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int tokens = Tile::kTokens >> cta.log_share_x();
    for (int first = 0; first < Tile::kTokens; first += tokens)
#pragma unroll
      for (int box = 0; box < Tile::kXBoxes; ++box)
        ptx::cp_async_bulk_tensor_2d(ring.here() + (box * Tile::kTokens + first) * 128, &a.x, k + 64 * box,
                                     work.token0 + first, ring.full_here(), a.x_policy);
  }
  __device__ void multicast(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int first = (Tile::kTokens >> cta.log_share_x()) * cta.row();
    const uint16_t ctas = ((1 << cta.share_x()) - 1) << cta.beside(0, cta.token());
#pragma unroll
    for (int box = 0; box < Tile::kXBoxes; ++box)
      ptx::cp_async_bulk_tensor_2d_multicast(ring.here() + (box * Tile::kTokens + first) * 128, &a.x, k + 64 * box,
                                             work.token0 + first, ring.full_here(), ctas, a.x_policy);
  }
};

// All stages of a ring in order.
template <class Tile, class Copies>
class Feed {
 public:
  __device__ explicit Feed(const Cta<Tile>& cta) : cta_(cta), copies_{cta}, ring_(copies_.ring()) { locate(); }

  __device__ bool shares() const { return copies_.log_sharing(); }

  // The first lap, for which nothing has to be handed back.
  __device__ void fill() {
    if (copies_.waits()) ptx::griddepcontrol_wait();
    while (more() && ring_.phase == 0) copy();
  }
  __device__ void refill() {
    while (more()) {
      ring_.await_empty();
      copy();
    }
  }

 private:
  __device__ void copy() {
    ring_.expect();
    if (copies_.log_sharing() && work_.tiles > 1) {
      copies_.multicast(ring_, work_, k_);
    } else {
      copies_.local(ring_, work_, k_);
    }
    ring_.advance();
    if ((k_ += Copies::kStep) < 128 * work_.k_end) return;
    index_ += cta_.clusters;
    if (more()) locate();
  }
  __device__ bool more() const { return index_ < cta_.pieces(); }
  __device__ void locate() {
    work_ = cta_.work(index_);
    k_ = 128 * work_.k_begin;
  }

  const Cta<Tile>& cta_;
  Copies copies_;
  Ring ring_;
  uint32_t index_ = cta_.cluster;
  Work work_;
  int k_;
};

// Code that runs once takes longest to be fetched: up to the first copy, which all else waits for, each instruction
// counts. So one warp of a ring finds out what to copy, and another sets up the barriers meanwhile.

// The warp that copies, one thread of it. It waits for other CTAs only where its copies reach them.
template <class Copies, class Tile>
__device__ void feed(const Cta<Tile>& cta) {
  const bool elected = ptx::elect_sync();
  Feed<Tile, Copies> feed(cta);
  ptx::bar_sync(kFullBarrier + Copies::kRing, 64);
  if (feed.shares()) cluster_sync();
  if (elected) feed.fill();
  __syncwarp();
  if (!cta.alone() && !feed.shares()) ptx::barrier_cluster_arrive_relaxed();
  ptx::bar_sync(kEmptyBarrier + Copies::kRing, 64);
  if (elected) feed.refill();
  __syncwarp();
  if (!cta.alone() && !feed.shares()) ptx::barrier_cluster_wait_acquire();
}

// The warp that sets up: first what the first copies need.
template <class Copies, class Tile>
__device__ void set_up(const Cta<Tile>& cta) {
  const bool elected = ptx::elect_sync();
  const Copies copies{cta};
  if (elected) copies.ring().init_full();
  __syncwarp();
  ptx::bar_arrive(kFullBarrier + Copies::kRing, 64);
  if (elected) {
    copies.ring().init_empty(Tile::kWarps << copies.log_sharing());
    if (Copies::kRing == 0) cta.init_reduced();
  }
  __syncwarp();
  ptx::bar_arrive(kEmptyBarrier + Copies::kRing, 64);
  ptx::bar_arrive(kSetUpBarrier, Tile::kConsumers + 64);
  if (!cta.alone()) cluster_sync();
}

}  // namespace esparse::wgmma::detail
