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
  uint32_t weights_handback, x_handback;  // barriers of stage 0 that this lane arrives at to hand a stage back, or 0
  int buffer = 0;                         // of the two for y
  float sum[Tile::kBlocks][Tile::kParts][Tile::kSums / Tile::kParts];
  float low[Tile::kBlocks], high[Tile::kBlocks];  // bias of this thread's rows g and g+8 of each block

  __device__ explicit Consumer(const Cta<Tile>& cta) : cta(cta), weights(cta.weights()), x(cta.x()) {}

  // Lane i hands back to the i-th CTA whose copies reach this one; where only its own do, it counts as often.
  __device__ void begin(const Work& work) {
    const int row = cta.row, token = cta.token, share_x = cta.a.share_x;
    const bool whole = work.whole();
    weights_handback = lane < cta.a.share_w ? ptx::mapa(weights.empty(0), whole ? row + share_x * lane : cta.rank) : 0;
    x_handback = lane < share_x ? ptx::mapa(x.empty(0), whole ? lane + share_x * token : cta.rank) : 0;
    load_bias(work);
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
  __device__ void multiply(const Work& work) {
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) at(b, i) = 0.f;

    uint2 even[Tile::kBlocks], odd[Tile::kBlocks];
    const int steps = work.k_end - work.k_begin;
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

  // Where, in one of the two buffers of CTA `mine`, this warpgroup's sums lie that it exchanges with CTA `other`.
  __device__ uint32_t exchanged(uint32_t buffer, int mine, int other) const {
    const int slot = other < mine ? other : other - 1;
    const int columns = (Tile::kColumns + cta.a.ctas - 1) / cta.a.ctas;
    return cta.shared + buffer + (slot * Tile::kWarpgroups + warpgroup) * columns * Tile::kBlocks * 2048;
  }

  // Add up the sums of the CTAs that split K. Afterwards they are whole in this CTA's own columns.
  __device__ void reduce() {
    const int ctas = cta.a.ctas, rank = cta.rank;
    const bool issuer = thread % 128 == 0;
    for (int i = 1; i < ctas; ++i) {
      const int other = rank + i < ctas ? rank + i : rank + i - ctas;
      const int first = share_begin(Tile::kColumns, other, ctas), end = share_begin(Tile::kColumns, other + 1, ctas);
      const uint32_t from = exchanged(cta.a.sent, rank, other);
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
      if (issuer)
        ptx::cp_async_bulk_to_cluster(ptx::mapa(exchanged(cta.a.received, other, rank), other), from,
                                      (end - first) * Tile::kBlocks * 2048, ptx::mapa(cta.reduced(), other));
      __syncwarp();
    }
    wait(cta.reduced(), 0);
    const int first = share_begin(Tile::kColumns, rank, ctas), end = share_begin(Tile::kColumns, rank + 1, ctas);
    for (int i = 0; i < ctas; ++i) {
      if (i == rank) continue;
      const uint32_t from = exchanged(cta.a.received, rank, i);
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
    const bool whole = work.whole();  // spares the divisions
    const int first = whole ? 0 : share_begin(Tile::kColumns, work.part, work.parts);
    const int end = whole ? Tile::kColumns : share_begin(Tile::kColumns, work.part + 1, work.parts);
    if constexpr (Tile::kStoresByWarp) {
      store_by_warp(work, first, end);
    } else {
      store_by_warpgroup(work, first, end);
    }
  }

  // A warp turns its [16 channels][16 tokens] around in a buffer of its own, swizzled, and writes 32 bytes a token.
  __device__ void store_by_warp(const Work& work, int first, int end) {
    const uint32_t buffers = cta.shared + cta.a.staging + thread / 32 * 1024;
    const int row = lane % 8, half = lane / 8 % 2, column = lane / 16;  // this lane's address for stmatrix
    const uint32_t to = column * 256 + row * 32 + (half ^ row >> 2) * 16;
    const int token = lane / 2;
    const uint32_t from = token * 32 + (lane % 2 ^ (token >> 2 & 1)) * 16;
    T* const y = static_cast<T*>(cta.a.y);
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

  // A warpgroup turns [64 channels][8 kChunk tokens] around in one of two buffers, swizzled, and writes 128 bytes a
  // token: whole lines, of which stores take one at a time.
  __device__ void store_by_warpgroup(const Work& work, int first, int end) {
    constexpr int kChunk = Tile::kChunk;
    const uint32_t buffers = cta.shared + cta.a.staging + warpgroup * 2 * kChunk * 1024;
    const int column = lane / 16, row = lane % 8, half = lane / 8 % 2;  // this lane's address for stmatrix
    const uint32_t to = column * 1024 + row * 128 + ((2 * warp + half) ^ row) * 16;
    T* const y = static_cast<T*>(cta.a.y);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n = work.row0 + (warpgroup * Tile::kBlocks + b) * 64 + lane % 8 * 8;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kColumns; chunk += kChunk) {
        if (chunk + kChunk <= first || chunk >= end) continue;
        const uint32_t here = buffers + buffer * kChunk * 1024;
        buffer ^= 1;
#pragma unroll
        for (int j = chunk; j < chunk + kChunk; j += 2)
          ptx::stmatrix_x4_trans(here + (j - chunk) * 1024 + to, pack_low(b, j), pack_high(b, j), pack_low(b, j + 1),
                                 pack_high(b, j + 1));
        ptx::bar_sync(1 + warpgroup, 128);  // and so the warps have also read what was here two chunks ago
#pragma unroll
        for (int i = 0; i < kChunk / 2; ++i) {
          const int token = warp * 2 * kChunk + 4 * i + lane / 8;
          const uint4 out = ptx::ld_shared_v4(here + token * 128 + ((lane ^ token) % 8) * 16);
          const int m = work.token0 + 8 * chunk + token, mine = chunk + token / 8;
          if (mine >= first && mine < end && m < cta.a.m && n < cta.a.n)
            *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * cta.a.n + n) = out;
        }
      }
    }
  }
};

}  // namespace esparse::wgmma::detail
