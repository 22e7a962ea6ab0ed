// What the host and the device of the wgmma.sp GEMM agree on. See wgmma.cuh for the algorithm.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

namespace esparse::wgmma {

struct Arguments {
  CUtensorMap values, metadata, x, y;
  const void* bias;  // [N], or null
  void* y_data;      // [M, N]
  int m, n;
  int k_tiles, k_rest;               // of 128 k: in each slice of K, and one more in the first k_rest
  int columns, columns_rest;         // of 8 tokens, the same: what the CTA of each slice completes
  int row_clusters, token_clusters;  // tiles of y^T, in clusters
  int group;                         // token clusters that are worked on together
  int share_x, share_w, split;       // the cluster: CTAs along rows, along tokens, along K
  int weights_stages, x_stages;
  uint32_t staging, sent, received, barriers;  // offsets in shared memory
  int exchange_in_ring;                        // sums of other CTAs are exchanged where the stages were
  uint64_t weight_policy, x_policy;            // for L2
};

constexpr int weights_bytes(int rows) { return rows * (128 + 16); }  // of a stage of 128 k: values, metadata
// A stage of x is 64 k, or 128 k where the wgmmas are so short that each wait counts.
constexpr int x_boxes(int tokens) { return tokens <= 64 ? 2 : 1; }
constexpr int x_bytes(int tokens) { return x_boxes(tokens) * tokens * 128; }
// Warps write tiles of few tokens themselves, which is sooner; the copy engine writes those of many meanwhile.
constexpr bool stores_by_warp(int tokens) { return tokens <= 64; }
// Columns of 8 tokens that the copy engine takes together, from one of two buffers of each warpgroup.
constexpr int chunk(int tokens) { return tokens < 256 ? 4 : 2; }
constexpr int staging_bytes(int tokens, int warpgroups) {
  return warpgroups * (stores_by_warp(tokens) ? 4 * 1024 : 2 * chunk(tokens) * 1024);
}

// A compiled kernel.
struct Kernel {
  int rows, tokens, warpgroups;
  bool light;        // two CTAs fit on an SM
  const void* fp16;  // kernels of Arguments
  const void* bf16;
};

// Each file of kernels adds its own.
void add_narrow(std::vector<Kernel>& kernels);  // wgmma_narrow.cu: tiles of 16 .. 64 tokens
void add_wide(std::vector<Kernel>& kernels);    // wgmma_wide.cu: 128 tokens and more

}  // namespace esparse::wgmma
