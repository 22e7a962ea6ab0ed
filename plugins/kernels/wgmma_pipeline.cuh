// How the wgmma.sp GEMM is fed: its tile, the rings of stages in shared memory, and the warps that keep them full.
#pragma once

#include "wgmma.h"
#include "wgmma_ptx.cuh"

namespace esparse::wgmma {

template <typename T_, int kWarpgroups_, int kBlocks_, int kTokens_, bool kPingpong>
struct Tile {
  using T = T_;
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
  static constexpr int kSums = kTokens / 2;              // fp32 sums of a thread in one block of 64 rows
  static constexpr int kColumns = kTokens / 8;           // columns of 8 tokens, four sums each
  static constexpr bool kLight = kBlocks * kSums <= 32;  // few enough registers for two CTAs on an SM
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
  int bytes, stages;
  int stage = 0;
  uint32_t phase = 0;

  __device__ Ring(uint32_t data, uint32_t full, int bytes, int stages)
      : data(data), full(full), bytes(bytes), stages(stages) {}
  __device__ uint32_t here() const { return data + stage * bytes; }
  __device__ uint32_t full_here() const { return full + 8 * stage; }
  __device__ uint32_t empty(int i) const { return full + 8 * (stages + i); }

  // By the `part`-th of `parts` warps, one lane each: of several lanes an mbarrier.init runs one after another.
  __device__ void init(int warps, int part, int parts) const {
    for (int i = part; i < stages; i += parts) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty(i), warps);
    }
  }
  // For the producer: wait until the stage is free, and announce its bytes.
  __device__ void claim() const {
    wait(empty(stage), phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(full_here(), bytes);
  }
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

// Where the `part`-th of `parts` nearly equal shares of `count` begins; it ends where the next begins.
__device__ inline int share_begin(int count, int part, int parts) {
  return part * (count / parts) + min(part, count % parts);
}

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
  const int rank = ptx::cluster_ctarank(), cluster = ptx::clusterid_x(), clusters = ptx::nclusterid_x();
  // Its tile in a block of the cluster, and its part of K: rank = row + share_x (token + share_w part).
  const int row = ptx::cluster_ctaid_x(), token = ptx::cluster_ctaid_y(), part = ptx::cluster_ctaid_z();

  __device__ Cta(const Arguments& a, uint32_t shared) : a(a), shared(shared) {}

  __device__ Ring weights() const { return {shared, shared + a.barriers + 8, Tile::kWeightsBytes, a.weights_stages}; }
  __device__ Ring x() const {
    return {shared + a.weights_stages * Tile::kWeightsBytes, shared + a.barriers + 8 + 16 * a.weights_stages,
            Tile::kXBytes, a.x_stages};
  }
  __device__ uint32_t reduced() const { return shared + a.barriers; }
  __device__ int pieces() const { return a.blocks + a.tiles; }
  // Whether this cluster splits K in its last piece. Where in all, it has only one; otherwise where that is a single
  // tile, as `blocks` is then a multiple of `clusters`.
  __device__ bool splits() const { return a.split > 1 || cluster < a.tiles; }
  // The CTA at (row, token) that works on the same part of K.
  __device__ int beside(int row, int token) const { return row + a.share_x * (token + a.share_w * part); }

  // The `index`-th piece. Blocks of tiles run along the tokens within groups of `group` clusters of tokens, so that
  // CTAs at work together share rows of W and x in L2.
  __device__ Work work(int index) const {
    Work work{row, token, a.share_x * a.share_w, part, a.split, 0, a.k_tiles};  // row, token: at first in the block
    if (index >= a.blocks) {
      const int tile = (index - a.blocks) % work.tiles;
      index = a.blocks + (index - a.blocks) / work.tiles;
      work = {tile % a.share_x, tile / a.share_x, 1, rank, a.ctas, 0, a.k_tiles};
    }
    if (!work.whole()) {
      work.k_begin = share_begin(a.k_tiles, work.part, work.parts);
      work.k_end = share_begin(a.k_tiles, work.part + 1, work.parts);
    }
    int row_cluster = index, token_cluster = 0;
    if (a.token_clusters > 1) {
      const int in_group = a.group * a.row_clusters;
      const int first = index / in_group * a.group;
      const int width = min(a.group, a.token_clusters - first);
      row_cluster = index % in_group / width;
      token_cluster = first + index % in_group % width;
    }
    work.row0 = (row_cluster * a.share_x + work.row0) * Tile::kRows;
    work.token0 = (token_cluster * a.share_w + work.token0) * Tile::kTokens;
    return work;
  }

  // One thread of each warp of the last warpgroup. A stage is free when every multiplying warp of every CTA that this
  // one's copies reach is done with it.
  __device__ void init_barriers(int warp) const {
    weights().init(Tile::kWarps * a.share_w, warp, 4);
    x().init(Tile::kWarps * a.share_x, warp, 4);
    if (warp == 3) ptx::mbarrier_init(reduced(), 1);
    ptx::fence_mbarrier_init();
  }

  // All copies of weights: the rows of this CTA's tile, or of a row of tiles its share for all of them.
  __device__ void produce_weights() const {
    const int rows = Tile::kRows / a.share_w, mine = token * rows;
    uint16_t ctas = 0;
    for (int other = 0; other < a.share_w; ++other) ctas |= 1 << beside(row, other);
    Ring ring = weights();
    for (int index = cluster; index < pieces(); index += clusters) {
      const Work work = this->work(index);
      if (a.share_w > 1 && work.tiles > 1) {
        const int n = work.row0 + mine;
        for (int kt = work.k_begin; kt < work.k_end; ++kt, ring.advance()) {
          ring.claim();
          ptx::cp_async_bulk_tensor_2d_multicast(ring.here() + mine * 128, &a.values, 64 * kt, n, ring.full_here(),
                                                 ctas, a.weight_policy);
          ptx::cp_async_bulk_tensor_3d_multicast(ring.here() + Tile::kRows * 128 + mine * 16, &a.metadata, 0, n / 64,
                                                 kt, ring.full_here(), ctas, a.weight_policy);
        }
      } else {
        for (int kt = work.k_begin; kt < work.k_end; ++kt, ring.advance()) {
          ring.claim();
          for (int first = 0; first < Tile::kRows; first += rows) {
            const int n = work.row0 + first;
            ptx::cp_async_bulk_tensor_2d(ring.here() + first * 128, &a.values, 64 * kt, n, ring.full_here(),
                                         a.weight_policy);
            ptx::cp_async_bulk_tensor_3d(ring.here() + Tile::kRows * 128 + first * 16, &a.metadata, 0, n / 64, kt,
                                         ring.full_here(), a.weight_policy);
          }
        }
      }
    }
  }

  // The same for x.
  __device__ void produce_x() const {
    const int tokens = Tile::kTokens / a.share_x, mine = row * tokens;
    const uint16_t ctas = ((1 << a.share_x) - 1) << beside(0, token);
    Ring ring = x();
    for (int index = cluster; index < pieces(); index += clusters) {
      const Work work = this->work(index);
      const int end = 128 * work.k_end;
      if (a.share_x > 1 && work.tiles > 1) {
        for (int k = 128 * work.k_begin; k < end; k += 64 * Tile::kXBoxes, ring.advance()) {
          ring.claim();
#pragma unroll
          for (int box = 0; box < Tile::kXBoxes; ++box)
            ptx::cp_async_bulk_tensor_2d_multicast(ring.here() + (box * Tile::kTokens + mine) * 128, &a.x, k + 64 * box,
                                                   work.token0 + mine, ring.full_here(), ctas, a.x_policy);
        }
      } else {
        for (int k = 128 * work.k_begin; k < end; k += 64 * Tile::kXBoxes, ring.advance()) {
          ring.claim();
          for (int first = 0; first < Tile::kTokens; first += tokens)
#pragma unroll
            for (int box = 0; box < Tile::kXBoxes; ++box)
              ptx::cp_async_bulk_tensor_2d(ring.here() + (box * Tile::kTokens + first) * 128, &a.x, k + 64 * box,
                                           work.token0 + first, ring.full_here(), a.x_policy);
        }
      }
    }
  }
};

}  // namespace detail
}  // namespace esparse::wgmma
