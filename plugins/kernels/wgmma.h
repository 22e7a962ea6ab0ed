// What the host and the device of the wgmma.sp GEMM agree on. See wgmma.cuh for the algorithm.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

#include "esparse/sparse_gemm.h"

namespace esparse::wgmma {

// Division of what is less than 2^31 by a divisor that is known at launch: a multiplication, as a division takes a
// hundred clocks. factor / 2^(31 + shift) exceeds 1 / divisor by too little to matter.
struct Divisor {
  uint32_t shift = 0, factor = 0;
  Divisor() = default;
  explicit Divisor(uint32_t divisor) {
    while (uint32_t{1} << shift < divisor) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / divisor + 1);
  }
  __host__ __device__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{2 * n} * factor >> 32) >> shift;
  }
};

// Nearly equal shares of `count`: the first `rest` have one more. Where the `part`-th ends, the next begins.
struct Shares {
  int each, rest;
  __host__ __device__ int begin(int part) const { return part * each + (part < rest ? part : rest); }
};

// What the first copies need comes first, in the line of the constant cache that they wait for.
struct Arguments {
  uint8_t log_share_x, log_share_w;  // of a cluster: tiles along the rows, along the tokens
  uint8_t split, ctas;               // parts of K; all of a cluster
  uint8_t weights_stages, x_stages;
  uint8_t programmatic;              // x may not be there yet when the kernel starts
  int x_arrives;                     // bytes of a stage of x
  int k_tiles;                       // of 128 k
  Shares k_shares;                   // of those who split K
  uint32_t blocks, tiles;            // pieces of work: blocks of tiles, then single ones of which all CTAs split K
  uint32_t token_clusters;           // blocks of tiles of y^T: along the tokens
  uint64_t weight_policy, x_policy;  // for L2
  uint32_t row_clusters;             // along the rows
  uint32_t group, in_group;          // token clusters that are worked on together, and their blocks
  Divisor by_group, by_in_group;
  Shares column_shares;        // the columns of a tile that each of those who split K adds up
  uint32_t staging, received;  // offsets in shared memory
  int exchange_in_ring;        // sums of other CTAs are received where the stages were
  int m, n;
  int columns;  // n, or with an activation n / 2
  esparse_activation activation;
  const void* bias;  // [N], or null
  void* y;           // [M, columns]
  CUtensorMap values, metadata, x;
};

constexpr int kMaxStages = 12;  // of a ring
// At the beginning of shared memory, where the compiler knows them: that of the exchange, then each ring's.
constexpr int kBarriersBytes = 1024;
constexpr int weights_bytes(int rows) { return rows * (128 + 16); }  // of a stage of 128 k: values, metadata
// A stage of x is 64 k, or 128 k where the wgmmas are so short that each wait counts.
constexpr int x_boxes(int tokens) { return tokens <= 64 ? 2 : 1; }
constexpr int x_bytes(int tokens) { return x_boxes(tokens) * tokens * 128; }
// Each warp turns its part of a tile of few tokens around by itself, which is sooner; a warpgroup, whose stores fill
// lines of 128 bytes, that of a larger one, in chunks of this many columns of 8 tokens.
constexpr bool stores_by_warp(int tokens) { return tokens <= 64; }
constexpr int chunk(int tokens) { return tokens < 256 ? 4 : 2; }
constexpr int staging_bytes(int tokens, int warpgroups) {
  return warpgroups * (stores_by_warp(tokens) ? 4 * 1024 : 2 * chunk(tokens) * 1024);
}

// A compiled kernel.
struct Kernel {
  int rows, tokens, warpgroups;
  bool light;        // two CTAs fit on an SM
  bool shares;       // for clusters whose CTAs share x or W
  bool pingpong;     // each warpgroup has a tile of its own
  const void* fp16;  // kernels of Arguments
  const void* bf16;
};

// Each file of kernels adds its own.
void add_narrow(std::vector<Kernel>& kernels);  // wgmma_narrow.cu: tiles of 16 .. 64 tokens
void add_wide(std::vector<Kernel>& kernels);    // wgmma_wide.cu: 128 tokens and more

}  // namespace esparse::wgmma
