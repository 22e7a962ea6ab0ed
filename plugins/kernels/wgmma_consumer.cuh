// The warpgroups of the wgmma.sp GEMM that multiply: mainloop, sum over the CTAs that split K, y.
#pragma once

#include "wgmma_pipeline.cuh"

namespace esparse::wgmma::detail {

// Shared-memory matrix descriptor: K-major, 128-byte swizzle, 8-row groups 1024 bytes apart.
__device__ inline uint64_t descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

// Rows [64 kBlocks warpgroup, + 64 kBlocks) of the tile.
template <class Tile>
struct Consumer {
  using T = typename Tile::T;
  const Cta<Tile>& cta;
  const int thread = threadIdx.x, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes: descriptors are uniform
  Ring weights, x;
  uint32_t weights_handback = 0, x_handback = 0;  // barriers of stage 0 that this lane arrives at to hand a stage back
  int buffer = 0;                                 // of the two for y
  float sum[Tile::kBlocks][Tile::kParts][Tile::kSums / Tile::kParts];
  float low[Tile::kBlocks], high[Tile::kBlocks];  // bias of this thread's rows g and g+8 of each block

  __device__ explicit Consumer(const Cta<Tile>& cta) : cta(cta), weights(cta.weights()), x(cta.x()) {
    // Lane i takes the i-th CTA whose copies reach this one.
    const Arguments& a = cta.a;
    const Place& here = cta.place;
    if (lane < a.share_w) weights_handback = ptx::mapa(weights.empty(0), rank_of(a, here.row, lane, here.slice));
    if (lane < a.share_x) x_handback = ptx::mapa(x.empty(0), rank_of(a, lane, here.token, here.slice));
  }

  // The i-th sum of a block.
  __device__ float& at(int b, int i) {
    return sum[b][i / (Tile::kSums / Tile::kParts)][i % (Tile::kSums / Tile::kParts)];
  }

  // Before the product, which then hides the latency.
  __device__ void load_bias(const Work& work) {
    const T* bias = static_cast<const T*>(cta.a.bias);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n = work.row0 + (warpgroup * Tile::kBlocks + b) * 64 + 16 * warp + lane / 4;
      low[b] = bias && n < cta.a.n ? static_cast<float>(bias[n]) : 0.f;
      high[b] = bias && n + 8 < cta.a.n ? static_cast<float>(bias[n + 8]) : 0.f;
    }
  }

  // Start the wgmmas of half a 128-k tile, on the 64 k of x at `here`.
  template <int kHalf>
  __device__ void issue(const uint2 (&words)[Tile::kBlocks], uint32_t here) {
    // Descriptors count in units of 16 bytes: 32 bytes of values and 64 of x for each 32 k.
    const uint64_t values = descriptor(weights.here() + warpgroup * Tile::kBlocks * 64 * 128 + kHalf * 64);
    const uint64_t tokens = descriptor(here);
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part)
          ptx::Wgmma<T, Tile::kTokens / Tile::kParts>::template add<kHalf>(
              sum[b][part], values + (b * 64 * 128 + q * 32) / 16,
              tokens + (part * Tile::kTokens / Tile::kParts * 128 + q * 64) / 16, q ? words[b].y : words[b].x);
  }

  // All wgmmas of a 128-k tile. `words` stay in registers of their own until these have ended, in the next call.
  __device__ void step(uint2 (&words)[Tile::kBlocks], bool first) {
    weights.await();
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
      words[b] =
          ptx::ld_shared_v2(weights.here() + Tile::kRows * 128 + (lane >> 1 & 1) * 8 +
                            ((((warpgroup * Tile::kBlocks + b) * 4 + warp) * 2 + (lane & 1)) * 8 + (lane >> 2)) * 16);
    x.await();
    ptx::wgmma_fence();
    issue<0>(words, x.here());
    if constexpr (Tile::kXBoxes == 1) {
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (!first) release_before();
      const int stage = x.stage;
      x.advance();
      x.await();
      ptx::wgmma_fence();
      issue<1>(words, x.here());
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (x_handback) ptx::mbarrier_arrive_cluster(x_handback + 8 * stage);
    } else {
      issue<1>(words, x.here() + Tile::kTokens * 128);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
      if (!first) release_before();
    }
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
    for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) at(b, i) = 0.f;

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
    for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i)
        asm volatile("" : "+f"(at(b, i))::"memory");  // none is read before the wait
  }

  // Where this warpgroup's sums lie that slice `from` sends to slice `to`, in the buffer at `buffer` of one of the two.
  __device__ uint32_t exchanged(uint32_t buffer, int mine, int other) const {
    const int slot = other < mine ? other : other - 1;
    const int columns = cta.a.columns + (cta.a.columns_rest > 0);
    return cta.shared + buffer + (slot * Tile::kWarpgroups + warpgroup) * columns * Tile::kBlocks * 2048;
  }

  // Add up the sums of the CTAs that split K. Afterwards they are whole in this CTA's own columns.
  __device__ void reduce() {
    const int slice = cta.place.slice;
    const bool issuer = thread % 128 == 0;
    for (int i = 1; i < cta.a.split; ++i) {
      const int other = slice + i < cta.a.split ? slice + i : slice + i - cta.a.split;
      const int first = cta.first_column(other), end = cta.first_column(other + 1);
      const uint32_t from = exchanged(cta.a.sent, slice, other);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        if (j < first || j >= end) continue;
#pragma unroll
        for (int b = 0; b < Tile::kBlocks; ++b)
          ptx::st_shared_v4(from + (((j - first) * Tile::kBlocks + b) * 128 + thread % 128) * 16, at(b, 4 * j),
                            at(b, 4 * j + 1), at(b, 4 * j + 2), at(b, 4 * j + 3));
      }
      ptx::fence_proxy_async();
      ptx::bar_sync(1 + warpgroup, 128);
      if (issuer) {
        const uint32_t there = rank_of(cta.a, cta.place.row, cta.place.token, other);
        ptx::cp_async_bulk_to_cluster(ptx::mapa(exchanged(cta.a.received, other, slice), there), from,
                                      (end - first) * Tile::kBlocks * 2048, ptx::mapa(cta.reduced(), there));
      }
      __syncwarp();
    }
    wait(cta.reduced(), 0);
    const int first = cta.first_column(slice), end = cta.first_column(slice + 1);
    for (int i = 0; i < cta.a.split; ++i) {
      if (i == slice) continue;
      const uint32_t from = exchanged(cta.a.received, slice, i);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        if (j < first || j >= end) continue;
#pragma unroll
        for (int b = 0; b < Tile::kBlocks; ++b) {
          const uint4 other = ptx::ld_shared_v4(from + (((j - first) * Tile::kBlocks + b) * 128 + thread % 128) * 16);
          at(b, 4 * j) += __uint_as_float(other.x);
          at(b, 4 * j + 1) += __uint_as_float(other.y);
          at(b, 4 * j + 2) += __uint_as_float(other.z);
          at(b, 4 * j + 3) += __uint_as_float(other.w);
        }
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
  __device__ uint32_t pack_low(int b, int j) { return pack(at(b, 4 * j) + low[b], at(b, 4 * j + 1) + low[b]); }
  __device__ uint32_t pack_high(int b, int j) { return pack(at(b, 4 * j + 2) + high[b], at(b, 4 * j + 3) + high[b]); }

  // y = sum + bias in this CTA's columns.
  __device__ void store(const Work& work) {
    const int first = cta.first_column(cta.place.slice), end = cta.first_column(cta.place.slice + 1);
    if constexpr (Tile::kStoresByWarp) {
      store_by_warp(work, first, end);
    } else {
      store_by_tma(work, first, end);
    }
  }

  // A warp turns its [16 channels][16 tokens] around in a buffer of its own, swizzled, and writes 32 bytes a token.
  __device__ void store_by_warp(const Work& work, int first, int end) {
    const uint32_t buffers = cta.shared + cta.a.staging + thread / 32 * 1024;
    const int row = lane % 8, half = lane / 8 % 2, column = lane / 16;  // this lane's address for stmatrix
    const uint32_t to = column * 256 + row * 32 + (half ^ row >> 2) * 16;
    const int token = lane / 2;
    const uint32_t from = token * 32 + (lane % 2 ^ (token >> 2 & 1)) * 16;
    T* const y = static_cast<T*>(cta.a.y_data);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n = work.row0 + (warpgroup * Tile::kBlocks + b) * 64 + 16 * warp + lane % 2 * 8;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; j += 2) {
        if (j + 2 <= first || j >= end) continue;
        const uint32_t here = buffers + j / 2 % 2 * 512;
        __syncwarp();
        ptx::stmatrix_x4_trans(here + to, pack_low(b, j), pack_high(b, j), pack_low(b, j + 1), pack_high(b, j + 1));
        __syncwarp();
        const uint4 out = ptx::ld_shared_v4(here + from);
        const int m = work.token0 + 8 * j + token, mine = j + token / 8;
        if (mine >= first && mine < end && m < cta.a.m && n < cta.a.n)
          *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * cta.a.n + n) = out;
      }
    }
  }

  // The copy engine writes [8 tokens][64 channels] a column, which the warpgroup turns around, swizzled.
  __device__ void store_by_tma(const Work& work, int first, int end) {
    constexpr int kChunk = Tile::kChunk;
    const uint32_t buffers = cta.shared + cta.a.staging + warpgroup * 2 * kChunk * 1024;
    const int row = lane % 8, half = lane / 8 % 2;  // this lane's address for stmatrix: token `row`, 8 channels
    const uint32_t swizzled = row * 128 + (((2 * warp + half) ^ row) * 16);
    const bool issuer = thread % 128 == 0;
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n0 = work.row0 + (warpgroup * Tile::kBlocks + b) * 64;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kColumns; chunk += kChunk) {
        if (chunk + kChunk <= first || chunk >= end) continue;
        const uint32_t to = buffers + buffer * kChunk * 1024;
        buffer ^= 1;
        if (issuer) ptx::cp_async_bulk_wait_group_read<1>();
        __syncwarp();
        ptx::bar_sync(1 + warpgroup, 128);
#pragma unroll
        for (int j = chunk; j < chunk + kChunk; ++j)
          ptx::stmatrix_x2_trans(to + (j - chunk) * 1024 + swizzled, pack_low(b, j), pack_high(b, j));
        ptx::fence_proxy_async();
        ptx::bar_sync(1 + warpgroup, 128);
        if (issuer) {
          for (int j = max(chunk, first); j < min(chunk + kChunk, end); ++j)
            ptx::cp_async_bulk_tensor_2d_store(&cta.a.y, n0, work.token0 + 8 * j, to + (j - chunk) * 1024);
          ptx::cp_async_bulk_commit_group();
        }
        __syncwarp();
      }
    }
  }
};

}  // namespace esparse::wgmma::detail
