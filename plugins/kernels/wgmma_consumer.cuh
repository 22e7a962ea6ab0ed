// The warpgroups of the wgmma.sp GEMM that multiply: mainloop and y.
#pragma once

#include "gate.cuh"
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
  const int turn = Tile::kTurns > 1 ? warpgroup : 0;
  const int block0 = Tile::kTurns > 1 ? 0 : warpgroup * Tile::kBlocks;  // its first of the tile's blocks of 64 rows
  Ring weights, x;
  uint32_t weights_handback, x_handback;  // barriers of stage 0 that this lane arrives at to hand a stage back, or 0
  int buffer = 0;                         // of the two for y
  float sum[Tile::kBlocks][Tile::kParts][Tile::kSums / Tile::kParts];
  float low[Tile::kBlocks], high[Tile::kBlocks];  // bias of this thread's rows g and g+8 of each block

  __device__ explicit Consumer(const Cta<Tile>& cta) : cta(cta), weights(cta.weights()), x(cta.x()) {
    if (turn == 1) {
      pass_turn();
      skip_turn();
    }
  }

  // Pingpong: the other warpgroup multiplies its tile while this one stores. The stages of their tiles follow each
  // other, so that a warpgroup may look at the rings only in its turn, and then skips those of the other's tile.
  __device__ void await_turn() const {
    if constexpr (Tile::kTurns > 1) ptx::bar_sync(kTurnBarrier + turn, 256);
  }
  __device__ void pass_turn() const {
    if constexpr (Tile::kTurns > 1) ptx::bar_arrive(kTurnBarrier + 1 - turn, 256);
  }
  __device__ void skip_turn() {
    if constexpr (Tile::kTurns == 1) return;
    weights.skip(cta.a.k_tiles);
    x.skip(cta.a.k_tiles * 2 / Tile::kXBoxes);
  }

  // Lane i hands back to the i-th CTA whose copies reach this one; where only its own do, it counts as often.
  __device__ void begin(const Work& work) {
    const bool shares = work.tiles > 1;
    const int along_tokens = shares ? cta.beside(cta.row(), lane) : cta.rank;
    const int along_rows = shares ? cta.beside(lane, cta.token()) : cta.rank;
    weights_handback = lane < cta.share_w() ? ptx::mapa(weights.empty(0), along_tokens) : 0;
    x_handback = lane < cta.share_x() ? ptx::mapa(x.empty(0), along_rows) : 0;
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
      const int n = work.row0 + (block0 + b) * 64 + 16 * warp + lane / 4;
      low[b] = bias && n < cta.a.n ? static_cast<float>(bias[n]) : 0.f;
      high[b] = bias && n + 8 < cta.a.n ? static_cast<float>(bias[n + 8]) : 0.f;
    }
  }

  // Start the wgmmas of half a 128-k tile, on the 64 k of x at `here`.
  template <int kHalf>
  __device__ void issue(const uint2 (&words)[Tile::kBlocks], uint32_t here) {
    // Descriptors count in units of 16 bytes: 32 bytes of values and 64 of x for each 32 k.
    const uint64_t values = descriptor(weights.here() + block0 * 64 * 128 + kHalf * 64);
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
                            ((((block0 + b) * 4 + warp) * 2 + (lane & 1)) * 8 + (lane >> 2)) * 16);
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
      if (x_handback) ptx::mbarrier_arrive_cluster(x_handback + 16 * stage);
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
    if (weights_handback) ptx::mbarrier_arrive_cluster(weights_handback + 16 * w);
    if (x_handback) ptx::mbarrier_arrive_cluster(x_handback + 16 * t);
  }

  // sum = the product over this CTA's k. After the `last` piece of the CTA nobody waits for the stages.
  __device__ void multiply(const Work& work, bool last) {
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) at(b, i) = 0.f;

    uint2 even[Tile::kBlocks], odd[Tile::kBlocks];
    const int steps = work.k_end - work.k_begin;
    await_turn();
    for (int i = 0; i + 1 < steps; i += 2) {
      step(even, i == 0);
      step(odd, false);
    }
    if (steps & 1) step(even, steps == 1);
    pass_turn();
    ptx::wgmma_wait_group<0>();
    if (!last) release_before();
    skip_turn();
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i)
        asm volatile("" : "+f"(at(b, i))::"memory");  // none is read before the wait
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

  // Of gate and up, which are a thread's rows g and g+8.
  __device__ uint32_t pack_gated(const Gate& gate, int b, int j) {
    return pack(gate(at(b, 4 * j) + low[b], at(b, 4 * j + 2) + high[b]),
                gate(at(b, 4 * j + 1) + low[b], at(b, 4 * j + 3) + high[b]));
  }

  // y = sum + bias, or what the activation makes of it, in this CTA's columns.
  __device__ void store(const Work& work) {
    const bool whole = work.whole();
    const int first = whole ? 0 : cta.a.column_shares.begin(work.part);
    const int end = whole ? Tile::kColumns : cta.a.column_shares.begin(work.part + 1);
    cta.a.activation ? store<true>(work, first, end) : store<false>(work, first, end);
  }

  template <bool kGated>
  __device__ void store(const Work& work, int first, int end) {
    if constexpr (Tile::kStoresByWarp) {
      store_by_warp<kGated>(work, first, end);
    } else {
      store_by_warpgroup<kGated>(work, first, end);
    }
  }

  // A warp turns its [16 channels][16 tokens] around in a buffer of its own, swizzled, and writes 32 bytes a token. Of
  // gate and up, [8 channels][16 tokens]: the other half of the buffer is not used.
  template <bool kGated>
  __device__ void store_by_warp(const Work& work, int first, int end) {
    const uint32_t buffers = cta.shared + cta.a.staging + thread / 32 * 1024;
    const int row = lane % 8, half = lane / 8 % 2, column = lane / 16;  // this lane's address for stmatrix
    const uint32_t to = column * 256 + row * 32 + (half ^ row >> 2) * 16;
    const int token = lane / 2;
    const uint32_t from = token * 32 + (lane % 2 ^ (token >> 2 & 1)) * 16;
    T* const y = static_cast<T*>(cta.a.y);
    const Gate gate(cta.a.activation);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int rows = work.row0 + (block0 + b) * 64 + 16 * warp;
      const int n = !kGated ? rows + lane % 2 * 8 : lane % 2 ? cta.a.columns : rows / 2;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; j += 2) {
        if (j + 2 <= first || j >= end) continue;
        const uint32_t here = buffers + j / 2 % 2 * 512;
        __syncwarp();
        if constexpr (kGated) {
          ptx::stmatrix_x4_trans(here + to, pack_gated(gate, b, j), 0, pack_gated(gate, b, j + 1), 0);
        } else {
          ptx::stmatrix_x4_trans(here + to, pack_low(b, j), pack_high(b, j), pack_low(b, j + 1), pack_high(b, j + 1));
        }
        __syncwarp();
        const uint4 out = ptx::ld_shared_v4(here + from);
        const int m = work.token0 + 8 * j + token, mine = j + token / 8;
        if (mine >= first && mine < end && m < cta.a.m && n < cta.a.columns)
          *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * cta.a.columns + n) = out;
      }
    }
  }

  // A warpgroup turns [64 channels][8 kChunk tokens] around in one of two buffers, swizzled, and writes 128 bytes a
  // token: whole lines, of which stores take one at a time. Of gate and up, 32 channels of twice as many tokens.
  template <bool kGated>
  __device__ void store_by_warpgroup(const Work& work, int first, int end) {
    constexpr int kPieces = kGated ? 4 : 8;  // of 16 bytes, a token
    constexpr int kChunk = Tile::kChunk * 8 / kPieces, kColumnBytes = 8 * kPieces * 16;
    const auto place = [](int token, int piece) {
      return token * kPieces * 16 + (piece ^ (kGated ? token / 2 : token) % kPieces) * 16;
    };
    const uint32_t buffers = cta.shared + cta.a.staging + warpgroup * 2 * kChunk * kColumnBytes;
    const int matrix = lane / 8;  // this lane's address for stmatrix
    const uint32_t to = kGated ? matrix * kColumnBytes + place(lane % 8, warp)
                               : matrix / 2 * kColumnBytes + place(lane % 8, 2 * warp + matrix % 2);
    T* const y = static_cast<T*>(cta.a.y);
    const Gate gate(cta.a.activation);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) {
      const int n = (work.row0 + (block0 + b) * 64) * kPieces / 8 + lane % kPieces * 8;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kColumns; chunk += kChunk) {
        if (chunk + kChunk <= first || chunk >= end) continue;
        const uint32_t here = buffers + buffer * kChunk * kColumnBytes;
        buffer ^= 1;
#pragma unroll
        for (int j = chunk; j < chunk + kChunk; j += kGated ? 4 : 2) {
          const uint32_t there = here + (j - chunk) * kColumnBytes + to;
          if constexpr (kGated) {
            ptx::stmatrix_x4_trans(there, pack_gated(gate, b, j), pack_gated(gate, b, j + 1),
                                   pack_gated(gate, b, j + 2), pack_gated(gate, b, j + 3));
          } else {
            ptx::stmatrix_x4_trans(there, pack_low(b, j), pack_high(b, j), pack_low(b, j + 1), pack_high(b, j + 1));
          }
        }
        ptx::bar_sync(1 + warpgroup, 128);  // and so the warps have also read what was here two chunks ago
#pragma unroll
        for (int i = 0; i < kChunk * kPieces / 16; ++i) {
          const int token = warp * 2 * kChunk + i * 32 / kPieces + lane / kPieces;
          const uint4 out = ptx::ld_shared_v4(here + place(token, lane % kPieces));
          const int m = work.token0 + 8 * chunk + token, mine = chunk + token / 8;
          if (mine >= first && mine < end && m < cta.a.m && n < cta.a.columns)
            *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * cta.a.columns + n) = out;
        }
      }
    }
  }
};

}  // namespace esparse::wgmma::detail
