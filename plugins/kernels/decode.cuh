// Decode kernels: y[M,N] = x[M,K] W[N,K]^T + bias for M <= 16, bound by the time that W takes to arrive.
//
// A CTA has kRowWarps x kDepthWarps warps and computes blocks of 16 kRowWarps rows of W, one or, where more blocks are
// there than CTAs fit, several. K is cut into tiles of 128, the tiles into `splits` contiguous ranges, one for each CTA
// of a cluster; inside a CTA the tiles go round robin to the kDepthWarps warps of a row group. So a warp's work is a
// list of (16 rows, 128 k) tiles of 2 KiB of values and 256 bytes of metadata, which it streams through a ring of its
// own in shared memory, kStages deep: the main loop synchronises with nothing but its own copies, and the ring stays
// full from one row block to the next. The ring costs no registers, so the CTAs of the next kernel can be resident
// under programmatic launch and fill their rings while this one drains.
//
// x comes from L2, but a copy that is asked for behind a GPU full of rings arrives behind them, and the memory then
// idles while full rings wait for x. So x goes first, except under programmatic launch, where it has to wait for the
// previous kernel.
//
// Fragments: values lie in the ring as rows of 128 bytes, 16-byte chunks swizzled by row % 8, so that ldmatrix reads A
// without conflicts; x lies as rows padded by 16 bytes, which does the same for B. The metadata words are those that
// mma.sp consumes: for the 32 k of block q, lanes t = lane % 4 in {2s, 2s+1} supply word (h = t % 2, g = lane / 4, q)
// under selector s. With s = q / 2 every lane reads one pair of words, and no lane reads what another does.
//
// Sums: each warp pushes its 16 x M partial sums to the CTA of the cluster that owns those rows, into whose barrier the
// copies count; the owner adds them in a fixed order, so results do not depend on timing. It owns gate and up of a
// channel both, where there is an activation.
#pragma once

#include <cuda_runtime.h>

#include "decode.h"
#include "esparse/sparse_gemm.h"
#include "gate.cuh"
#include "ptx.cuh"

namespace esparse::decode {

// Which part of W a CTA multiplies.
struct Share {
  int blocks;        // of C::kRows rows; the CTA takes blockIdx.x, blockIdx.x + gridDim.x ..
  int first, tiles;  // K tiles
  int rank;          // in the cluster

  __device__ Share(const esparse_gemm& p, int rows, const Plan& at) : rank(blockIdx.y) {
    const int k_tiles = static_cast<int>(ceil_div(p.k, kTileK));
    first = rank * k_tiles >> at.log_splits;
    tiles = ((rank + 1) * k_tiles >> at.log_splits) - first;
    blocks = (static_cast<int>(p.n) + rows - 1) / rows;
  }
};

// A warp's tiles, in the order in which it multiplies them, and its ring.
template <typename C>
class Stream {
 public:
  __device__ Stream(const esparse_gemm& p, const Share& share, uint32_t shared)
      : p_(p),
        share_(share),
        block_(blockIdx.x),
        tile_(depth_warp()),
        base_(shared + warp() * C::kStages * kStageBytes),
        policy_(ptx::createpolicy_evict_first()) {
    if (tile_ >= share.tiles) block_ = share.blocks;  // no work for this warp
    metadata_tile_ = static_cast<int>(ceil_div(p.n, kTileN) * kTileN * kMetadataBytes / kWarpRows / 16);
    locate();
  }

  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int row_warp() { return warp() % C::kRowWarps; }
  __device__ static int depth_warp() { return warp() / C::kRowWarps; }

  __device__ uint32_t address(int stage) const { return base_ + stage * kStageBytes; }

  // Start the copies of the next tile, if there is one, as one group.
  __device__ void fetch(int stage) {
    if (block_ < share_.blocks) {
      const int lane = threadIdx.x % 32, row = lane / 8, chunk = lane % 8, tile = share_.first + tile_;
      const uint32_t to = address(stage), bytes = tile * static_cast<int>(kTileK) + chunk * 16 < p_.k ? 16 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ptx::cp_async_16(to + (row + 4 * i) * 128 + ((chunk ^ (row + 4 * i) % 8) * 16),
                         static_cast<const uint4*>(p_.values) + (values_[i] + tile * (kTileK / 16)), bytes, policy_);
      if (lane < kMetadataBytes / 16)
        ptx::cp_async_16(to + kValuesBytes + 16 * lane,
                         reinterpret_cast<const uint4*>(p_.metadata) + (metadata_ + tile * metadata_tile_), 16,
                         policy_);
      if ((tile_ += C::kDepthWarps) >= share_.tiles) {
        tile_ = depth_warp();
        block_ += gridDim.x;
        locate();
      }
    }
    ptx::cp_async_commit_group();
  }

 private:
  __device__ void locate() {
    const int lane = threadIdx.x % 32, first_row = block_ * C::kRows + row_warp() * kWarpRows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Absent rows read the last one that is there; their sums are never stored.
      const uint32_t row = min(first_row + lane / 8 + 4 * i, static_cast<int>(p_.n) - 1);
      values_[i] = row * static_cast<uint32_t>(p_.k / 16) + lane % 8;
    }
    metadata_ = min(first_row * (kMetadataBytes / kWarpRows / 16), metadata_tile_ - kMetadataBytes / 16) + lane;
  }

  const esparse_gemm& p_;
  const Share& share_;
  uint32_t values_[4];  // offsets in units of 16 bytes
  int metadata_, metadata_tile_;
  int block_, tile_;
  uint32_t base_;
  uint64_t policy_;  // weights are read once; x, which every CTA reads, shall stay in L2
};

// x[:, first_k .. first_k + tiles * kTileK) to shared memory, zero beyond K. Completes on the barrier, or, gathered
// through a permutation, at the next __syncthreads.
template <typename T>
__device__ void load_x(const esparse_gemm& p, const Share& share, const Plan& at, unsigned char* shared) {
  const int m = static_cast<int>(p.m), first_k = share.first * static_cast<int>(kTileK);
  const int valid = min(static_cast<int>(p.k) - first_k, share.tiles * static_cast<int>(kTileK));
  const T* x = static_cast<const T*>(p.x);
  if (!p.permutation) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t barrier = ptx::shared_address(shared + at.barriers);
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(barrier, m * valid * 2);
    if (threadIdx.x % 32 == 0)
#pragma unroll 1
      for (int token = warp; token < m; token += warps)
        ptx::cp_async_bulk(ptx::shared_address(shared + at.x + token * at.x_stride), x + token * p.k + first_k,
                           valid * 2, barrier);
    return;
  }
  // A thread gathers 8 channels of two tokens at a time: 16 loads in flight.
  const int pieces = valid / 8, pairs = (m + 1) / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < pairs * pieces; i += blockDim.x) {
    const int token = 2 * (i / pieces), piece = i % pieces;
    const int4* from = reinterpret_cast<const int4*>(p.permutation + first_k) + 2 * piece;
    const int4 low = __ldg(from), high = __ldg(from + 1);
    const auto gather = [&](const T* row, T(&out)[8]) {
      out[0] = row[low.x], out[1] = row[low.y], out[2] = row[low.z], out[3] = row[low.w];
      out[4] = row[high.x], out[5] = row[high.y], out[6] = row[high.z], out[7] = row[high.w];
    };
    __align__(16) T out[2][8];
    gather(x + token * p.k, out[0]);
    gather(x + min(token + 1, m - 1) * p.k, out[1]);
    unsigned char* to = shared + at.x + token * at.x_stride + 16 * piece;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out[0]);
    if (token + 1 < m) *reinterpret_cast<uint4*>(to + at.x_stride) = *reinterpret_cast<const uint4*>(out[1]);
  }
}

// Where K is not a multiple of the tile: the rest of x's last tile.
__device__ inline void clear_x_tail(const esparse_gemm& p, const Share& share, const Plan& at, unsigned char* shared) {
  const int valid = static_cast<int>(p.k) - share.first * static_cast<int>(kTileK);
  const int pieces = (share.tiles * static_cast<int>(kTileK) - valid) / 8;
  if (pieces <= 0) return;
  for (int i = threadIdx.x; i < p.m * pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(shared + at.x + i / pieces * at.x_stride + valid * 2 + 16 * (i % pieces)) = uint4{};
}

// sums[group] += W tile (16 rows, 128 k) x tokens 8 group .. 8 group + 7.
template <typename T, int kTokenGroups>
__device__ void multiply(float (&sums)[kTokenGroups][4], uint32_t stage, const uint32_t (&x)[kTokenGroups], int tile) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = lane % 16, half = lane / 16;
  uint32_t metadata[2], a[4][4];
  ptx::ld_shared(stage + kValuesBytes + ((t % 2 * 8 + g) * 4 + t / 2 * 2) * 4, metadata);
#pragma unroll
  for (int q = 0; q < 4; ++q) ptx::ldmatrix_x4(stage + row * 128 + (((2 * q + half) ^ (row % 8)) * 16), a[q]);
#pragma unroll
  for (int group = 0; group < kTokenGroups; ++group)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t b[4];
      ptx::ldmatrix_x4(x[group] + tile * kXTileBytes + q * 64, b);
      if (q < 2) ptx::mma_sp_m16n8k32<T, 0>(sums[group], a[q], b, metadata[q % 2]);
      if (q >= 2) ptx::mma_sp_m16n8k32<T, 1>(sums[group], a[q], b, metadata[q % 2]);
    }
}

// Push a warp's sums to the owners of their rows: in the cluster, counted by the owner's barrier, or in the CTA.
template <typename C, bool kCluster, int kTokenGroups>
__device__ void push_sums(const float (&sums)[kTokenGroups][4], int m, int slot, int row_warp, const Plan& at,
                          uint32_t partials, uint32_t barrier) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int row = row_warp * kWarpRows + 8 * upper + g, owner = kCluster ? row >> at.log_owned : 0;
    uint32_t to = partials + (slot * m * at.partials_stride + row - (owner << at.log_owned)) * 4, counted = barrier;
    if (kCluster) to = ptx::mapa(to, owner), counted = ptx::mapa(barrier, owner);
#pragma unroll
    for (int group = 0; group < kTokenGroups; ++group)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int token = 8 * group + 2 * t + i; token < m) {
          const uint32_t there = to + token * at.partials_stride * 4;
          if (kCluster)
            ptx::st_async(there, sums[group][2 * upper + i], counted);
          else
            ptx::st_shared(there, sums[group][2 * upper + i]);
        }
  }
}

// The four columns of y that a thread stores: of four rows of those that the CTA owns, or, gated, of four rows of gate
// and the four of up that lie 8 below.
template <typename C, bool kGated>
struct Output {
  static constexpr int kRows = kGated ? 8 : 4;
  int row;    // the first, to be compared with n
  int local;  // the same among the owned rows

  __device__ Output(int block, int rank, const Plan& at)
      : row(block * C::kRows + (rank << at.log_owned)), local(kRows * threadIdx.x & ((1 << at.log_owned) - 1)) {
    if (kGated) local = (local & ~15) + local / 2 % 8;
    row += local;
  }
  __device__ int column() const { return kGated ? row / 16 * 8 + row % 8 : row; }  // in y's row
};

// Add the partial sums and the bias, and let up pass the gate.
template <typename T, typename C, bool kGated>
__device__ void store_y(const esparse_gemm& p, const Output<C, kGated>& output, const uint2 (&bias_bits)[1 + kGated],
                        const Plan& at, const float* partials) {
  using Output = decode::Output<C, kGated>;
  if (output.row >= p.n) return;
  const int m = static_cast<int>(p.m);
  const T* bias = reinterpret_cast<const T*>(&bias_bits);  // of the four rows, and of those of up
#pragma unroll 1
  for (int token = Output::kRows * threadIdx.x >> at.log_owned; token < m;
       token += Output::kRows * C::kThreads >> at.log_owned) {
    float sum[1 + kGated][4] = {};
    const float* from = partials + token * at.partials_stride + output.local;
#pragma unroll 1
    for (int split = 0; split < 1 << at.log_splits; ++split)
#pragma unroll
      for (int depth = 0; depth < C::kDepthWarps; ++depth, from += m * at.partials_stride)
#pragma unroll
        for (int i = 0; i <= kGated; ++i) {
          const float4 part = *reinterpret_cast<const float4*>(from + 8 * i);
          sum[i][0] += part.x, sum[i][1] += part.y, sum[i][2] += part.z, sum[i][3] += part.w;
        }
    __align__(8) T out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float y = sum[0][i] + static_cast<float>(bias[i]);
      if constexpr (kGated) {
        out[i] = static_cast<T>(Gate(p.activation)(y, sum[1][i] + static_cast<float>(bias[4 + i])));
      } else {
        out[i] = static_cast<T>(y);
      }
    }
    const int64_t columns = kGated ? p.n / 2 : p.n;
    *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + token * columns + output.column()) =
        *reinterpret_cast<uint2*>(out);
  }
}

// grid (at most the row blocks, splits), cluster (1, splits).
template <typename T, typename C, int kTokenGroups, bool kGated>
__global__ void __launch_bounds__(C::kThreads) decode(const __grid_constant__ esparse_gemm p,
                                                      const __grid_constant__ Plan at) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const Share share(p, C::kRows, at);
  // One for x, and two for the partial sums.
  const uint32_t barriers = ptx::shared_address(shared + at.barriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) ptx::mbarrier_init(barriers + 8 * i, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (at.log_splits) ptx::barrier_cluster_arrive_relaxed();

  // Up to griddepcontrol_wait, nothing depends on the previous kernel.
  Stream<C> stream(p, share, ptx::shared_address(shared));
#pragma unroll 1
  for (int stage = 0; stage <= C::kStages; ++stage) {
    if (stage == at.early) {
      ptx::griddepcontrol_launch_dependents();
      ptx::griddepcontrol_wait();
      load_x<T>(p, share, at, shared);
    }
    if (stage < C::kStages) stream.fetch(stage);
  }
  clear_x_tail(p, share, at, shared);
  __syncthreads();
  while (!p.permutation && !ptx::mbarrier_try_wait_parity(barriers, 0)) {
  }
  if (at.log_splits) ptx::barrier_cluster_wait_acquire();  // the others' barriers are there

  // Rows of absent tokens repeat the last one; their sums are never stored.
  uint32_t x[kTokenGroups];
#pragma unroll
  for (int group = 0; group < kTokenGroups; ++group)
    x[group] = ptx::shared_address(shared + at.x) + lane / 8 * 16 +
               min(8 * group + lane % 8, static_cast<int>(p.m) - 1) * at.x_stride;

  // Two buffers of partial sums in turn: a CTA that is ahead by one block does not overwrite what others still add. It
  // cannot be ahead by two: its sums of the second are complete when the others have pushed theirs, which they do when
  // they have added those of the first.
  int stage = 0, buffer = 0, parity = 0;
  for (int block = blockIdx.x; block < share.blocks; block += gridDim.x) {
    const uint32_t barrier = barriers + 8 + 8 * buffer;
    if (at.log_splits && threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(barrier, at.pushed_bytes);
    const Output<C, kGated> output(block, share.rank, at);
    uint2 bias[1 + kGated] = {};
    if (p.bias && output.row < p.n) {
      const uint2* from = reinterpret_cast<const uint2*>(static_cast<const T*>(p.bias) + output.row);
      bias[0] = __ldg(from);
      if constexpr (kGated) bias[1] = __ldg(from + 2);
    }
    float sums[kTokenGroups][4] = {};
    for (int tile = stream.depth_warp(); tile < share.tiles; tile += C::kDepthWarps) {
      ptx::cp_async_wait_group<C::kStages - 1>();
      __syncwarp();
      multiply<T>(sums, stream.address(stage), x, tile);
      __syncwarp();
      stream.fetch(stage);
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
    }
    unsigned char* partials = shared + at.partials + buffer * at.partials_bytes;
    const uint32_t to = ptx::shared_address(partials);
    const int slot = share.rank * C::kDepthWarps + stream.depth_warp(), m = static_cast<int>(p.m);
    if (at.log_splits) {
      if (block >= gridDim.x) __syncthreads();  // all warps have added the last block's sums
      push_sums<C, true>(sums, m, slot, stream.row_warp(), at, to, barrier);
      while (!ptx::mbarrier_try_wait_parity_cluster(barrier, parity)) {
      }
    } else {
      push_sums<C, false>(sums, m, slot, stream.row_warp(), at, to, barrier);
      __syncthreads();
    }
    store_y<T>(p, output, bias, at, reinterpret_cast<const float*>(partials));
    parity ^= buffer;
    buffer ^= 1;
  }
#endif
}

}  // namespace esparse::decode
