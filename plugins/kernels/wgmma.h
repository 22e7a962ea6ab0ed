// What the host and the device of the wgmma.sp GEMM agree on. See wgmma.cuh for the algorithm.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

namespace esparse::wgmma {

struct Arguments {
  CUtensorMap values, metadata, x, y;
  const void* bias;  // [N], or null
  int n;
  int k_tiles;                         // of 128 k
  int row_clusters, token_clusters;    // tiles of y^T, in clusters
  int group;                           // token clusters that are worked on together
  int share_x, share_w, split;         // the cluster: CTAs along rows, along tokens, along K
  int weights_stages, x_stages;        // of 128 and of 64 k
  uint32_t staging, reduce, barriers;  // offsets in shared memory
  int reduce_in_ring;                  // the sums of other CTAs go where the stages were
  uint64_t weight_policy, x_policy;    // for L2
};

constexpr int weights_bytes(int rows) { return rows * (128 + 16); }  // of a stage: values, metadata
constexpr int x_bytes(int tokens) { return tokens * 128; }           // of a stage
// Columns of 8 tokens that go to y together, through one of two buffers of each warpgroup.
constexpr int chunk(int tokens) { return tokens < 32 ? tokens / 8 : tokens < 256 ? 4 : 2; }
constexpr int staging_bytes(int tokens, int warpgroups) { return warpgroups * 2 * chunk(tokens) * 1024; }

constexpr int kMaxSplitTokens = 128;  // larger tiles are not split along K

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
