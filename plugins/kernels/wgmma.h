// What the host and the device of the wgmma.sp GEMM agree on. See wgmma.cuh for the algorithm.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

#include "esparse/sparse_gemm.h"

namespace esparse::wgmma {

struct Arguments {
  CUtensorMap values, metadata, x;
  const void* bias;  // [N], or null
  void* y;           // [M, columns]
  int m, n;
  int columns;  // n, or with an activation n / 2
  esparse_activation activation;
  int k_tiles;                        // of 128 k
  int row_clusters, token_clusters;   // the tiles of y^T in blocks of share_x x share_w
  int group;                          // token clusters that are worked on together
  int share_x, share_w, split, ctas;  // of a cluster: along the rows, the tokens and K of a block of tiles; all of them
  int blocks, tiles;                  // pieces of work: blocks of tiles, then single ones of which all CTAs split K
  int weights_stages, x_stages;
  uint32_t staging, received, barriers;  // offsets in shared memory
  int exchange_in_ring;                  // sums of other CTAs are received where the stages were
  uint64_t weight_policy, x_policy;      // for L2
};

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
  bool pingpong;     // each warpgroup has a tile of its own
  const void* fp16;  // kernels of Arguments
  const void* bf16;
};

// Each file of kernels adds its own.
void add_narrow(std::vector<Kernel>& kernels);  // wgmma_narrow.cu: tiles of 16 .. 64 tokens
void add_wide(std::vector<Kernel>& kernels);    // wgmma_wide.cu: 128 tokens and more

}  // namespace esparse::wgmma
