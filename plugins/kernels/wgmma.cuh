// y[M,N] = x[M,K] W[N,K]^T on wgmma.sp: W is the sparse operand A and comes, like x, from shared memory.
//
// A tile is y^T[rows, tokens]. The copy engine (TMA) fills two rings in shared memory,
//   weights  values [rows][64], 128 bytes a row, swizzled; metadata [rows/64] KiB, es24-v1 as it lies: 128 k a stage
//   x        [tokens][64], 128 bytes a row, swizzled: 64 k a stage
// and zero fills what lies outside the tensors, so that any M, N % 8 and K % 32 need no other care. In 128 k,
// wgmma q = 0..3 multiplies k = 32q .. 32q+31. Its metadata operand in warp w of a warpgroup and lane 4g+t holds rows
// 16w+g and 16w+g+8, k half t&1: the word (r16 = w, h = t&1, g, q). Lanes t = 0, 1 supply it with selector 0, lanes
// t = 2, 3 with selector 1; as the four q are adjacent words, one 8-byte load a lane serves 128 k.
//
// Warp specialisation: in the last warpgroup one warp drives the copies of the weights, which depend on no other
// kernel, and one those of x, which wait for the previous one; the other warpgroups multiply. A stage is handed back
// only when the wgmmas of the next one are under way, so the tensor cores never drain between stages.
//
// A cluster is share_x CTAs along the rows (each loads its part of the x tile and multicasts it to the others) times
// share_w along the tokens (the same for W) times `split` along K. The split CTAs of a tile each own tokens / split of
// its columns: every CTA pushes its partial sums to their owners' shared memory, the owners add them in a fixed order.
#pragma once

#include "wgmma.h"
#include "wgmma_ptx.cuh"

namespace esparse::wgmma {

template <typename T_, int kWarpgroups_, int kBlocks_, int kTokens_>
struct Tile {
  using T = T_;
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply, each kBlocks x 64 rows
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kRows = 64 * kWarpgroups * kBlocks;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kSums = kTokens / 2;              // fp32 sums of a thread in one block of 64 rows
  static constexpr int kColumns = kTokens / 8;           // columns of 8 tokens, four sums each
  static constexpr int kChunk = chunk(kTokens);          // columns that go to y together
  static constexpr bool kLight = kBlocks * kSums <= 32;  // few enough registers for two CTAs on an SM
  static constexpr int kWeightsBytes = weights_bytes(kRows);
  static constexpr int kXBytes = x_bytes(kTokens);
};

namespace detail {

// Shared-memory matrix descriptor: K-major, 128-byte swizzle, 8-row groups 1024 bytes apart.
__device__ inline uint64_t descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

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

  __device__ void init(int warps) const {
    for (int i = 0; i < stages; ++i) {
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
};

// Where this CTA stands in its cluster.
struct Place {
  int row, token, slice;
  __device__ explicit Place(const Arguments& a) {
    const int rank = static_cast<int>(ptx::cluster_ctarank());
    row = rank % a.share_x;
    token = rank / a.share_x % a.share_w;
    slice = rank / (a.share_x * a.share_w);
  }
};

__device__ inline int rank_of(const Arguments& a, int row, int token, int slice) {
  return row + a.share_x * (token + a.share_w * slice);
}

// The tile of this CTA in the cluster's `index`-th piece of work. Pieces run along the tokens within groups of
// `group` clusters of tokens, so that CTAs at work together share rows of W and x in L2.
struct Work {
  int row0, token0;  // first row and token of the tile
  __device__ Work(const Arguments& a, const Place& place, int index, int rows, int tokens) {
    const int in_group = a.group * a.row_clusters;
    const int first = index / in_group * a.group;
    const int width = min(a.group, a.token_clusters - first);
    const int row_cluster = index % in_group / width;
    const int token_cluster = first + index % in_group % width;
    row0 = (row_cluster * a.share_x + place.row) * rows;
    token0 = (token_cluster * a.share_w + place.token) * tokens;
  }
};

template <class Tile>
struct Cta {
  const Arguments& a;
  const uint32_t shared;  // base of shared memory
  const Place place;
  const int cluster, clusters, k_begin, k_end;  // this cluster of how many, and its 128-k tiles

  __device__ Cta(const Arguments& a, uint32_t shared)
      : a(a),
        shared(shared),
        place(a),
        cluster(blockIdx.x / (a.share_x * a.share_w * a.split)),
        clusters(gridDim.x / (a.share_x * a.share_w * a.split)),
        k_begin(place.slice * a.k_tiles / a.split),
        k_end((place.slice + 1) * a.k_tiles / a.split) {}

  __device__ Ring weights() const { return {shared, shared + a.barriers + 8, Tile::kWeightsBytes, a.weights_stages}; }
  __device__ Ring x() const {
    return {shared + a.weights_stages * Tile::kWeightsBytes, shared + a.barriers + 8 + 16 * a.weights_stages,
            Tile::kXBytes, a.x_stages};
  }
  __device__ uint32_t reduced() const { return shared + a.barriers; }
  __device__ Work work(int index) const { return {a, place, index, Tile::kRows, Tile::kTokens}; }
  __device__ int pieces() const { return a.row_clusters * a.token_clusters; }

  // A stage is free when every multiplying warp of every CTA that this one's copies reach is done with it.
  __device__ void init_barriers() const {
    weights().init(Tile::kConsumers / 32 * a.share_w);
    x().init(Tile::kConsumers / 32 * a.share_x);
    ptx::mbarrier_init(reduced(), 1);
    ptx::fence_mbarrier_init();
    if (a.split > 1)
      ptx::mbarrier_arrive_expect_tx(reduced(), Tile::kRows * Tile::kTokens * 4 / a.split * (a.split - 1));
  }

  // All copies of weights: of each stage this CTA's share_w-th of the rows, for all that share them.
  __device__ void produce_weights() const {
    const int rows = Tile::kRows / a.share_w, first = place.token * rows;
    uint16_t ctas = 0;
    for (int other = 0; other < a.share_w; ++other) ctas |= 1 << rank_of(a, place.row, other, place.slice);
    Ring ring = weights();
    for (int index = cluster; index < pieces(); index += clusters) {
      const int row = work(index).row0 + first;
      for (int kt = k_begin; kt < k_end; ++kt, ring.advance()) {
        ring.claim();
        const uint32_t values = ring.here() + first * 128, metadata = ring.here() + Tile::kRows * 128 + first * 16;
        if (a.share_w == 1) {
          ptx::cp_async_bulk_tensor_2d(values, &a.values, 64 * kt, row, ring.full_here(), a.weight_policy);
          ptx::cp_async_bulk_tensor_3d(metadata, &a.metadata, 0, row / 64, kt, ring.full_here(), a.weight_policy);
        } else {
          ptx::cp_async_bulk_tensor_2d_multicast(values, &a.values, 64 * kt, row, ring.full_here(), ctas,
                                                 a.weight_policy);
          ptx::cp_async_bulk_tensor_3d_multicast(metadata, &a.metadata, 0, row / 64, kt, ring.full_here(), ctas,
                                                 a.weight_policy);
        }
      }
    }
  }

  // The same for x: this CTA's share_x-th of the tokens.
  __device__ void produce_x() const {
    const int tokens = Tile::kTokens / a.share_x, first = place.row * tokens;
    const uint16_t ctas = ((1 << a.share_x) - 1) << rank_of(a, 0, place.token, place.slice);
    Ring ring = x();
    for (int index = cluster; index < pieces(); index += clusters) {
      const int token = work(index).token0 + first;
      for (int k = 128 * k_begin; k < 128 * k_end; k += 64, ring.advance()) {
        ring.claim();
        const uint32_t to = ring.here() + first * 128;
        if (a.share_x == 1) {
          ptx::cp_async_bulk_tensor_2d(to, &a.x, k, token, ring.full_here(), a.x_policy);
        } else {
          ptx::cp_async_bulk_tensor_2d_multicast(to, &a.x, k, token, ring.full_here(), ctas, a.x_policy);
        }
      }
    }
  }
};

// A warpgroup that multiplies: rows [64 kBlocks warpgroup, + 64 kBlocks) of the tile.
template <class Tile>
struct Consumer {
  using T = typename Tile::T;
  const Cta<Tile>& cta;
  const int thread = threadIdx.x, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes: descriptors are uniform
  Ring weights, x;
  uint32_t weights_handback = 0, x_handback = 0;  // barriers of stage 0 that this lane arrives at to hand a stage back
  int buffer = 0;                                 // of the two for y
  float sum[Tile::kBlocks][Tile::kSums];

  __device__ explicit Consumer(const Cta<Tile>& cta) : cta(cta), weights(cta.weights()), x(cta.x()) {
    // Lane i takes the i-th CTA whose copies reach this one.
    const Arguments& a = cta.a;
    const Place& here = cta.place;
    if (lane < a.share_w) weights_handback = ptx::mapa(weights.empty(0), rank_of(a, here.row, lane, here.slice));
    if (lane < a.share_x) x_handback = ptx::mapa(x.empty(0), rank_of(a, lane, here.token, here.slice));
  }

  // Start the wgmmas of half a 128-k tile, on the stage of x that comes next.
  template <int kHalf>
  __device__ void issue(const uint2 (&words)[Tile::kBlocks]) {
    // Descriptors count in units of 16 bytes: 32 bytes of values and 64 of x for each 32 k.
    const uint64_t values = descriptor(weights.here() + warpgroup * Tile::kBlocks * 64 * 128 + kHalf * 64);
    x.await();
    const uint64_t tokens = descriptor(x.here());
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
        ptx::Wgmma<T, Tile::kTokens>::template add<kHalf>(sum[b], values + (b * 64 * 128 + q * 32) / 16,
                                                          tokens + q * 64 / 16, q ? words[b].y : words[b].x);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
  }

  // All wgmmas of a 128-k tile. `words` stay in registers of their own until these have ended, in the next call.
  __device__ void step(uint2 (&words)[Tile::kBlocks], bool first) {
    weights.await();
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
      words[b] =
          ptx::ld_shared_v2(weights.here() + Tile::kRows * 128 + (lane >> 1 & 1) * 8 +
                            ((((warpgroup * Tile::kBlocks + b) * 4 + warp) * 2 + (lane & 1)) * 8 + (lane >> 2)) * 16);
    issue<0>(words);
    if (!first) release_before();
    const int stage = x.stage;
    x.advance();
    issue<1>(words);
    if (x_handback) ptx::mbarrier_arrive_cluster(x_handback + 8 * stage);
    x.advance();
    weights.advance();
  }

  // Hand back the stages before the present ones: the second half of the last step has ended.
  __device__ void release_before() const {
    const int w = (weights.stage ? weights.stage : weights.stages) - 1, t = (x.stage ? x.stage : x.stages) - 1;
    if (weights_handback) ptx::mbarrier_arrive_cluster(weights_handback + 8 * w);
    if (x_handback) ptx::mbarrier_arrive_cluster(x_handback + 8 * t);
  }

  // sum = the product over this CTA's k.
  __device__ void multiply() {
#pragma unroll
    for (auto& block : sum)
#pragma unroll
      for (float& s : block) s = 0.f;

    uint2 even[Tile::kBlocks], odd[Tile::kBlocks];
    const int steps = cta.k_end - cta.k_begin;
    for (int i = 0; i + 1 < steps; i += 2) {
      step(even, i == 0);
      step(odd, false);
    }
    if (steps & 1) step(even, steps == 1);
    ptx::wgmma_wait_group<0>();
    release_before();
#pragma unroll
    for (auto& block : sum)
#pragma unroll
      for (float& s : block) asm volatile("" : "+f"(s)::"memory");  // no sum is read before the wait
  }

  // Where the sums of column `j` of `block` lie in its owner's buffer, for the `slot`-th of the other CTAs.
  __device__ uint32_t slot_address(int slot, int columns, int j, int block) const {
    return cta.shared + cta.a.reduce +
           (((slot * columns + j) * Tile::kBlocks + block) * Tile::kConsumers + thread) * 16;
  }

  // Add up the sums of the CTAs that split K. Afterwards they are whole in this CTA's own columns.
  __device__ void reduce() {
    const int slice = cta.place.slice, columns = Tile::kColumns / cta.a.split;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int owner = j / columns, slot = slice < owner ? slice : slice - 1;
      if (owner == slice) continue;
      const uint32_t there = rank_of(cta.a, cta.place.row, cta.place.token, owner);
      const uint32_t barrier = ptx::mapa(cta.reduced(), there);
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
        ptx::st_async_v4(ptx::mapa(slot_address(slot, columns, j - owner * columns, b), there), sum[b][4 * j],
                         sum[b][4 * j + 1], sum[b][4 * j + 2], sum[b][4 * j + 3], barrier);
    }
    wait(cta.reduced(), 0);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      if (j / columns != slice) continue;
      for (int slot = 0; slot < cta.a.split - 1; ++slot)
#pragma unroll
        for (int b = 0; b < Tile::kBlocks; ++b) {
          const uint4 other = ptx::ld_shared_v4(slot_address(slot, columns, j - slice * columns, b));
          sum[b][4 * j] += __uint_as_float(other.x);
          sum[b][4 * j + 1] += __uint_as_float(other.y);
          sum[b][4 * j + 2] += __uint_as_float(other.z);
          sum[b][4 * j + 3] += __uint_as_float(other.w);
        }
    }
  }

  static __device__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(low, high);
      return reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return reinterpret_cast<const uint32_t&>(pair);
    }
  }

  // y = sum + bias in this CTA's columns, by way of shared memory: [8 tokens][64 channels] a column, swizzled.
  __device__ void store(const Work& work) {
    const int first = cta.place.slice * Tile::kColumns / cta.a.split, end = first + Tile::kColumns / cta.a.split;
    const uint32_t buffers = cta.shared + cta.a.staging + warpgroup * 2 * Tile::kChunk * 1024;
    const int row = lane % 8, half = lane / 8 % 2;  // this lane's address for stmatrix: token `row`, 8 channels
    const uint32_t swizzled = row * 128 + (((2 * warp + half) ^ row) * 16);
    const bool issuer = thread % 128 == 0;
    const T* bias = static_cast<const T*>(cta.a.bias);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n0 = work.row0 + (warpgroup * Tile::kBlocks + b) * 64;
      const int n = n0 + 16 * warp + lane / 4;
      const float low = bias && n < cta.a.n ? static_cast<float>(bias[n]) : 0.f;
      const float high = bias && n + 8 < cta.a.n ? static_cast<float>(bias[n + 8]) : 0.f;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kColumns; chunk += Tile::kChunk) {
        if (chunk + Tile::kChunk <= first || chunk >= end) continue;
        const uint32_t to = buffers + buffer * Tile::kChunk * 1024;
        buffer ^= 1;
        if (issuer) ptx::cp_async_bulk_wait_group_read<1>();
        __syncwarp();
        ptx::bar_sync(1 + warpgroup, 128);
#pragma unroll
        for (int j = chunk; j < chunk + Tile::kChunk; ++j)
          ptx::stmatrix_x2_trans(to + (j - chunk) * 1024 + swizzled, pack(sum[b][4 * j] + low, sum[b][4 * j + 1] + low),
                                 pack(sum[b][4 * j + 2] + high, sum[b][4 * j + 3] + high));
        ptx::fence_proxy_async();
        ptx::bar_sync(1 + warpgroup, 128);
        if (issuer) {
          for (int j = max(chunk, first); j < min(chunk + Tile::kChunk, end); ++j)
            ptx::cp_async_bulk_tensor_2d_store(&cta.a.y, n0, work.token0 + 8 * j, to + (j - chunk) * 1024);
          ptx::cp_async_bulk_commit_group();
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace detail

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLight ? 2 : 1) gemm(const __grid_constant__ Arguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace detail;
  extern __shared__ __align__(1024) char memory[];
  const Cta<Tile> cta(a, ptx::shared_address(memory));
  const int warp = threadIdx.x / 32;
  const bool leader = threadIdx.x % 32 == 0;
  constexpr int kWeightsWarp = Tile::kConsumers / 32, kXWarp = kWeightsWarp + 1;

  ptx::griddepcontrol_launch_dependents();
  if (warp >= kWeightsWarp) {
    if constexpr (!Tile::kLight && Tile::kWarpgroups == 2) ptx::setmaxnreg_dec<40>();
    if (warp == kWeightsWarp && leader) cta.init_barriers();
    __syncwarp();
    ptx::barrier_cluster_arrive_relaxed();
    // Copies that stay in this CTA need not wait until the others of the cluster have set up their barriers.
    if (warp == kWeightsWarp && leader && a.share_w == 1) cta.produce_weights();
    __syncwarp();
    ptx::barrier_cluster_wait_acquire();
    if (warp == kWeightsWarp && leader && a.share_w > 1) cta.produce_weights();
    if (warp == kXWarp && leader) {
      ptx::griddepcontrol_wait();
      cta.produce_x();
    }
    __syncwarp();
    if (a.reduce_in_ring) cluster_sync();
  } else {
    if constexpr (!Tile::kLight && Tile::kWarpgroups == 2) ptx::setmaxnreg_inc<232>();
    cluster_sync();
    Consumer<Tile> consumer(cta);
    for (int index = cta.cluster; index < cta.pieces(); index += cta.clusters) {
      consumer.multiply();
      if constexpr (Tile::kTokens <= kMaxSplitTokens) {
        if (a.reduce_in_ring) cluster_sync();
        if (a.split > 1) consumer.reduce();
      }
      consumer.store(cta.work(index));
    }
    if (threadIdx.x % 128 == 0) ptx::cp_async_bulk_wait_group_read<0>();
  }
  // Other CTAs' arrivals at this one's barriers must find it there.
  if (a.share_x * a.share_w > 1) {
    __syncwarp();
    cluster_sync();
  }
#endif
}

}  // namespace esparse::wgmma
