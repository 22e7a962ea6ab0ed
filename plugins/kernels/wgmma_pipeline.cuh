// What the warps of the wgmma.sp GEMM agree on: the tile, the rings of stages in shared memory, the order of the work.
#pragma once

#include "wgmma.h"
#include "wgmma_ptx.cuh"

namespace esparse::wgmma {

template <typename T_, int kWarpgroups_, int kBlocks_, int kTokens_, bool kShares_, bool kPingpong>
struct Tile {
  using T = T_;
  static constexpr bool kShares = kShares_;         // whether the CTAs of a cluster share x or W
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply, each kBlocks x 64 rows of a tile
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kTurns = kPingpong ? kWarpgroups : 1;  // warpgroups that take turns, each with a tile of its own
  static_assert(kTurns <= 2);
  static constexpr int kWarps = 4 * kWarpgroups / kTurns;  // that multiply a tile
  static constexpr int kRows = 16 * kWarps * kBlocks;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // wgmmas side by side along the tokens. One of 256 does not fit the registers with which 512 threads start, by which
  // ptxas judges it.
  static constexpr int kParts = kWarpgroups == 3 && kTokens == 256 ? 2 : 1;
  static constexpr int kSums = kTokens / 2;     // fp32 sums of a thread in one block of 64 rows
  static constexpr int kColumns = kTokens / 8;  // columns of 8 tokens, four sums each
  // Few enough registers for two CTAs on an SM.
  static constexpr bool kLight = kBlocks * kSums <= 32 && kWarpgroups <= 2;
  // Otherwise registers go from the warpgroup that copies to those that multiply.
  static constexpr bool kHeavy = !kLight && kWarpgroups > 1;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr int kWeightsBytes = weights_bytes(kRows);
  static constexpr int kXBytes = x_bytes(kTokens);
  static constexpr int kXBoxes = x_boxes(kTokens);
  static constexpr bool kStoresByWarp = stores_by_warp(kTokens);
  static constexpr int kChunk = chunk(kTokens);
};

namespace detail {

// Named barriers; the warpgroups that multiply have 1 and up. That its barriers are set up is told to the warp that
// copies by kFullBarrier and kEmptyBarrier, one each ring, and to those that multiply by kSetUpBarrier.
constexpr int kTurnBarrier = 4, kSetUpBarrier = 8, kFullBarrier = 9, kEmptyBarrier = 11;

__device__ inline void wait(uint32_t barrier, uint32_t phase) {
  while (!ptx::mbarrier_try_wait_parity(barrier, phase)) {
  }
}

// Nothing needs to be published: what the CTAs exchange arrives by copies that barriers in shared memory count.
__device__ inline void cluster_sync() {
  ptx::barrier_cluster_arrive_relaxed();
  ptx::barrier_cluster_wait_acquire();
}

// A ring of stages: `full` counts the bytes of a stage that arrive, `empty` the warps that are done with it. Position
// and phase are those of the thread that holds the object; the phase flips at each lap.
struct Ring {
  uint32_t data, full;
  int bytes, stages, arrives;  // bytes of a stage, and how many of them the copies bring
  int stage = 0;
  uint32_t phase = 0;

  __device__ Ring(uint32_t data, uint32_t full, int bytes, int stages, int arrives)
      : data(data), full(full), bytes(bytes), stages(stages), arrives(arrives) {}
  __device__ uint32_t here() const { return data + stage * bytes; }
  __device__ uint32_t full_here() const { return full + 16 * stage; }
  __device__ uint32_t empty(int i) const { return full + 16 * i + 8; }

  // Of all stages that there can be, as the compiler knows their number. A stage is full when the bytes are there that
  // one thread expects, and empty when `warps` warps are done with it.
  __device__ void init_full() const {
#pragma unroll
    for (int i = 0; i < kMaxStages; ++i) ptx::mbarrier_init(full + 16 * i, 1);
    ptx::fence_mbarrier_init();
  }
  __device__ void init_empty(int warps) const {
#pragma unroll
    for (int i = 0; i < kMaxStages; ++i) ptx::mbarrier_init(empty(i), warps);
    ptx::fence_mbarrier_init();
  }
  // For the thread that copies.
  __device__ void expect() const { ptx::mbarrier_arrive_expect_tx(full_here(), arrives); }
  __device__ void await_empty() const { wait(empty(stage), phase ^ 1); }
  __device__ void await() const { wait(full_here(), phase); }
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ void skip(int count) {
    phase ^= (stage + count) / stages & 1;
    stage = (stage + count) % stages;
  }
};

// What a CTA does of a piece of work.
struct Work {
  int row0, token0;    // first row and token of the tile
  int tiles;           // that the cluster works on; each has the CTAs rank % tiles + tiles * (0, 1, .. parts - 1)
  int part, parts;     // of K
  int k_begin, k_end;  // 128-k tiles
  __device__ bool whole() const { return parts == 1; }
};

template <class Tile>
struct Cta {
  const Arguments& a;
  const uint32_t shared;  // base of shared memory
  const int cluster = blockIdx.x, clusters = gridDim.x, rank = blockIdx.y;

  __device__ Cta(const Arguments& a, uint32_t shared) : a(a), shared(shared) {}

  __device__ int log_share_x() const { return Tile::kShares ? a.log_share_x : 0; }
  __device__ int log_share_w() const { return Tile::kShares ? a.log_share_w : 0; }
  __device__ int log_tiles() const { return log_share_x() + log_share_w(); }  // of a block
  __device__ int share_x() const { return 1 << log_share_x(); }
  __device__ int share_w() const { return 1 << log_share_w(); }
  // One that is alone is launched without a cluster, which is sooner.
  __device__ bool alone() const { return a.ctas == 1; }
  // Its tile in a block of the cluster, and its part of K: rank = row + share_x (token + share_w part).
  __device__ int row() const { return rank & (share_x() - 1); }
  __device__ int token() const { return rank >> log_share_x() & (share_w() - 1); }
  __device__ int part() const { return rank >> log_tiles(); }
  // The CTA at (row, token) that works on the same part of K.
  __device__ int beside(int row, int token) const {
    return row + ((token + (part() << log_share_w())) << log_share_x());
  }

  __device__ uint32_t reduced() const { return shared; }
  __device__ void init_reduced() const {
    ptx::mbarrier_init(reduced(), 1);
    ptx::fence_mbarrier_init();
  }
  __device__ Ring weights() const {
    return {shared + kBarriersBytes, shared + 16, Tile::kWeightsBytes, a.weights_stages, Tile::kWeightsBytes};
  }
  __device__ Ring x() const {
    return {weights().data + a.weights_stages * Tile::kWeightsBytes, shared + 16 + 16 * kMaxStages, Tile::kXBytes,
            a.x_stages, a.x_arrives};
  }

  __device__ uint32_t single_tiles() const { return Tile::kShares ? a.tiles : 0; }
  __device__ uint32_t pieces() const { return a.blocks + single_tiles(); }
  // Whether this cluster splits K in its last piece. Where in all, it has only one; otherwise where that is a single
  // tile, as `blocks` is then a multiple of `clusters`.
  __device__ bool splits() const { return a.split > 1 || cluster < single_tiles(); }

  // The `index`-th piece. Blocks of tiles run along the tokens within groups of `group` clusters of tokens, so that
  // CTAs at work together share rows of W and x in L2.
  __device__ Work work(uint32_t index) const {
    Work work{row(), token(), 1 << log_tiles(), part(), a.split, 0, a.k_tiles};  // row, token: at first in the block
    if (Tile::kShares && index >= a.blocks) {
      const int tile = (index - a.blocks) & (work.tiles - 1);
      index = a.blocks + ((index - a.blocks) >> log_tiles());
      work = {tile & (share_x() - 1), tile >> log_share_x(), 1, rank, a.ctas, 0, a.k_tiles};
    }
    if (!work.whole()) {
      work.k_begin = a.k_shares.begin(work.part);
      work.k_end = a.k_shares.begin(work.part + 1);
    }
    uint32_t row_cluster = index, token_cluster = 0;
    if (a.token_clusters > 1) {
      const uint32_t group = a.by_in_group.quotient(index), first = group * a.group;
      const uint32_t width = min(a.group, a.token_clusters - first);  // the last group may be narrower
      index -= group * a.in_group;
      row_cluster = width == a.group ? a.by_group.quotient(index) : index / width;
      token_cluster = first + index - row_cluster * width;
    }
    work.row0 = ((row_cluster << log_share_x()) + work.row0) * Tile::kRows;
    work.token0 = ((token_cluster << log_share_w()) + work.token0) * Tile::kTokens;
    return work;
  }
};

}  // namespace detail
}  // namespace esparse::wgmma
