// The two warps of the wgmma.sp GEMM that keep the rings full, one thread each.
#pragma once

#include "wgmma_pipeline.cuh"

namespace esparse::wgmma::detail {

// The copies of a stage of weights, 128 k from `k` on: the rows of this CTA's tile, or of a row of tiles its share for
// all of them.
template <class Tile>
struct WeightsCopies {
  static constexpr int kStep = 128;
  const Cta<Tile>& cta;

  __device__ Ring ring() const { return cta.weights(); }
  __device__ int log_sharing() const { return cta.a.log_share_w; }
  __device__ bool waits() const { return false; }

  __device__ void local(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int rows = Tile::kRows >> a.log_share_w;
    for (int first = 0; first < Tile::kRows; first += rows) {
      const int n = work.row0 + first;
      ptx::cp_async_bulk_tensor_2d(ring.here() + first * 128, &a.values, k / 2, n, ring.full_here(), a.weight_policy);
      ptx::cp_async_bulk_tensor_3d(ring.here() + Tile::kRows * 128 + first * 16, &a.metadata, 0, n / 64, k / 128,
                                   ring.full_here(), a.weight_policy);
    }
  }
  __device__ void multicast(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int first = (Tile::kRows >> a.log_share_w) * cta.token, n = work.row0 + first;
    uint16_t ctas = 0;
    for (int token = 0; token < cta.share_w(); ++token) ctas |= 1 << cta.beside(cta.row, token);
    ptx::cp_async_bulk_tensor_2d_multicast(ring.here() + first * 128, &a.values, k / 2, n, ring.full_here(), ctas,
                                           a.weight_policy);
    ptx::cp_async_bulk_tensor_3d_multicast(ring.here() + Tile::kRows * 128 + first * 16, &a.metadata, 0, n / 64,
                                           k / 128, ring.full_here(), ctas, a.weight_policy);
  }
};

// The same of x.
template <class Tile>
struct XCopies {
  static constexpr int kStep = 64 * Tile::kXBoxes;
  const Cta<Tile>& cta;

  __device__ Ring ring() const { return cta.x(); }
  __device__ int log_sharing() const { return cta.a.log_share_x; }
  __device__ bool waits() const { return cta.a.programmatic; }  // for the previous kernel

  __device__ void local(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int tokens = Tile::kTokens >> a.log_share_x;
    for (int first = 0; first < Tile::kTokens; first += tokens)
#pragma unroll
      for (int box = 0; box < Tile::kXBoxes; ++box)
        ptx::cp_async_bulk_tensor_2d(ring.here() + (box * Tile::kTokens + first) * 128, &a.x, k + 64 * box,
                                     work.token0 + first, ring.full_here(), a.x_policy);
  }
  __device__ void multicast(const Ring& ring, const Work& work, int k) const {
    const Arguments& a = cta.a;
    const int first = (Tile::kTokens >> a.log_share_x) * cta.row;
    const uint16_t ctas = ((1 << cta.share_x()) - 1) << cta.beside(0, cta.token);
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

  // Set up the ring. Where nobody waits for that, nor has to be waited for, every stage is filled as soon as there is
  // what counts its bytes.
  __device__ void start() {
    ring_.init_full();
    ptx::fence_mbarrier_init();
    if (cta_.log_tiles() == 0 && !copies_.waits())
      while (more() && ring_.phase == 0) copy();
    ring_.init_empty(Tile::kWarps << copies_.log_sharing());
    ptx::fence_mbarrier_init();
  }

  __device__ void rest() {
    if (copies_.waits()) ptx::griddepcontrol_wait();
    while (more()) {
      ring_.await_empty();
      copy();
    }
  }

  // Copies that stay in this CTA need not wait until the others of the cluster have set up their barriers.
  __device__ bool waits_for_cluster() const { return copies_.log_sharing(); }

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

// What a warp that copies does, the `elected` one of its threads.
template <class Copies, class Tile>
__device__ void feed(const Cta<Tile>& cta, bool elected) {
  Feed<Tile, Copies> feed(cta);
  if (elected) feed.start();
  __syncwarp();
  cta.arrive_set_up();
  if (feed.waits_for_cluster()) ptx::barrier_cluster_wait_acquire();
  if (elected) feed.rest();
  __syncwarp();
  if (!cta.alone() && !feed.waits_for_cluster()) ptx::barrier_cluster_wait_acquire();
}

}  // namespace esparse::wgmma::detail
