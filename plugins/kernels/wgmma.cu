// The candidates of the wgmma.sp GEMM, and their launch: tensor maps, cluster, shared memory.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "candidate.h"
#include "esparse/es24.h"
#include "launch.h"
#include "tma.h"
#include "wgmma.h"

namespace esparse {
namespace {

using wgmma::Arguments;
using wgmma::Kernel;

constexpr int kSharedOfSm = 228 * 1024, kSharedOfSystem = 1024;  // of the latter, one for each CTA
constexpr int kWorthSplitting = 2;                               // 128-k tiles for each CTA, at least

// What the CTAs of a cluster do, and how many fit on an SM: they split K of every tile, and share x and W.
struct Plan {
  int split = 1, share_x = 1, share_w = 1, per_sm = 1;
  int ctas() const { return split * share_x * share_w; }
  bool shares() const { return share_x * share_w > 1; }
};

int count(int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); }
wgmma::Shares shares(int count, int parts) { return {count / parts, count % parts}; }

class WgmmaCandidate final : public Candidate {
 public:
  WgmmaCandidate(const Kernel& kernel, const Plan& plan) : kernel_(kernel), plan_(plan) {}

  std::string name() const override {
    std::string name = "wgmma_n" + std::to_string(kernel_.rows) + "m" + std::to_string(kernel_.tokens);
    if (kernel_.pingpong) name += "_pingpong";
    if (plan_.split > 1) name += "_s" + std::to_string(plan_.split);
    if (plan_.share_x > 1) name += "_x" + std::to_string(plan_.share_x);
    if (plan_.share_w > 1) name += "_w" + std::to_string(plan_.share_w);
    if (plan_.per_sm > 1) name += "_o" + std::to_string(plan_.per_sm);
    return name;
  }

  const char* unsupported(const esparse_gemm& p, const esparse_gpu& gpu) const override {
    if (gpu.capability != 90) return "needs a GPU of compute capability 9.0";
    if (ceil_div(p.k, kTileK) < plan_.split) return "splits k into more parts than it has tiles of 128";
    if (kernel_.tokens <= 64 && p.m > 8 * kernel_.tokens) return "made for fewer tokens";
    return nullptr;
  }

  const char* launch(const esparse_gemm& p, const esparse_launch& launch) const override {
    Arguments a{};
    if (const char* error = encode_maps(p, a)) return error;
    a.bias = p.bias;
    a.y = p.y;
    a.m = static_cast<int>(p.m);
    a.n = static_cast<int>(p.n);
    a.columns = p.activation ? a.n / 2 : a.n;
    a.activation = p.activation;
    a.k_tiles = count(p.k, kTileK);
    a.row_clusters = count(p.n, kernel_.rows * plan_.share_x);
    a.token_clusters = count(p.m, kernel_.tokens * plan_.share_w);
    a.log_share_x = plan_.share_x / 2;  // of 1, 2, 4
    a.log_share_w = plan_.share_w / 2;
    a.split = plan_.split;
    a.ctas = plan_.ctas();
    a.programmatic = launch.programmatic;
    const int parts = a.split > 1 ? a.split : a.ctas;
    a.k_shares = shares(a.k_tiles, parts);
    a.column_shares = shares(kernel_.tokens / 8, parts);
    // Weights that a single token tile reads pass through L2 once; x is read by every row tile.
    a.weight_policy = a.token_clusters == 1 ? kEvictFirst : kEvictNormal;
    a.x_policy = a.token_clusters == 1 ? kEvictLast : kEvictNormal;
    const int shared = place_in_shared_memory(a);
    a.x_arrives = wgmma::x_boxes(kernel_.tokens) * tokens_at_once(p) * plan_.share_x * 128;
    const void* function = p.dtype == ESPARSE_FP16 ? kernel_.fp16 : kernel_.bf16;
    cudaError_t error = allow_shared_memory(function, shared);
    if (error) return cudaGetErrorString(error);

    cudaLaunchAttribute attributes[2]{};  // an attribute costs time: none that changes nothing
    cudaLaunchConfig_t config{};
    config.attrs = attributes;
    if (a.ctas > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {1, static_cast<unsigned>(a.ctas), 1};
    }
    if (launch.programmatic) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.gridDim = {1, static_cast<unsigned>(a.ctas)};  // of clusters_at_once
    config.blockDim = static_cast<unsigned>(128 * (kernel_.warpgroups + 1));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    const int clusters = clusters_at_once(config, function, a.row_clusters * a.token_clusters);
    config.gridDim.x = clusters;
    a.group = group(a, clusters);
    a.in_group = a.group * a.row_clusters;
    a.by_group = wgmma::Divisor(a.group);
    a.by_in_group = wgmma::Divisor(a.in_group);
    divide(a, clusters);
    void* arguments[] = {&a};
    error = cudaLaunchKernelExC(&config, function, arguments);
    return error ? cudaGetErrorString(error) : nullptr;
  }

 private:
  // That one copy of x brings. The copy engine fills absent tokens with zeros more slowly than it reads present ones:
  // where all tokens are in one tile it is not asked to. What is in their place does not matter, as a sum is of one
  // token, and that of an absent one is not stored.
  int tokens_at_once(const esparse_gemm& p) const {
    if (plan_.share_x > 1) return kernel_.tokens / plan_.share_x;
    return static_cast<int>(std::min<int64_t>(kernel_.tokens, p.m));
  }

  // What createpolicy gives for whole tensors.
  static constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000,
                            kEvictNormal = 0x1000000000000000;

  const char* encode_maps(const esparse_gemm& p, Arguments& a) const {
    const auto type = p.dtype == ESPARSE_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
    const uint64_t m = p.m, n = p.n, k = p.k, words = kTileN * kTileK / 32, row_tiles = ceil_div(p.n, kTileN);
    const uint32_t rows = kernel_.rows / plan_.share_w, tokens = static_cast<uint32_t>(tokens_at_once(p));
    const char* error = encode_tensor_map({type, p.values, 2, {k / 2, n}, {k}, {64, rows}, swizzle}, &a.values);
    if (!error) error = encode_tensor_map({type, p.x, 2, {k, m}, {2 * k}, {64, tokens}, swizzle}, &a.x);
    if (!error)
      error = encode_tensor_map({CU_TENSOR_MAP_DATA_TYPE_INT32,
                                 p.metadata,
                                 3,
                                 {words, row_tiles, static_cast<uint64_t>(ceil_div(p.k, kTileK))},
                                 {4 * words, 4 * words * row_tiles},
                                 {static_cast<uint32_t>(words), rows / 64, 1},
                                 CU_TENSOR_MAP_SWIZZLE_NONE},
                                &a.metadata);
    return error;
  }

  // Rings, buffers of y, what is received of the exchange, barriers. Returns the bytes.
  int place_in_shared_memory(Arguments& a) const {
    const int staging = wgmma::staging_bytes(kernel_.tokens, kernel_.warpgroups);
    const int available = kSharedOfSm / plan_.per_sm - kSharedOfSystem - staging - wgmma::kBarriersBytes;
    const int received = received_bytes(a.split), depth = std::min(wgmma::kMaxStages, count(a.k_tiles, a.split));
    int rings = fill_rings(a, depth, available - received);
    // Where all tiles are split, a buffer of its own spares a barrier of the cluster, but is not worth shallow rings.
    a.exchange_in_ring = a.split == 1 || a.x_stages * wgmma::x_boxes(kernel_.tokens) < 2 * std::min(4, depth);
    if (a.exchange_in_ring) rings = std::max(fill_rings(a, depth, available), received);
    a.staging = wgmma::kBarriersBytes + static_cast<uint32_t>(ceil_div(rings, 1024) * 1024);
    a.received = a.exchange_in_ring ? wgmma::kBarriersBytes : a.staging + staging;
    return static_cast<int>(a.staging) + staging + (a.exchange_in_ring ? 0 : received);
  }

  // What a CTA receives from the others that split a tile's K into `parts`.
  int received_bytes(int parts) const { return count(kernel_.tokens / 8, parts) * kernel_.rows * 8 * 4 * (parts - 1); }

  // As many stages as fit, both rings about as deep in k. Returns the bytes.
  int fill_rings(Arguments& a, int depth, int available) const {
    const int weights = wgmma::weights_bytes(kernel_.rows), x = wgmma::x_bytes(kernel_.tokens);
    int bytes = 0;
    a.weights_stages = a.x_stages = 0;
    for (;;) {
      const bool behind = 2 * a.weights_stages <= a.x_stages * wgmma::x_boxes(kernel_.tokens);
      const int next = behind ? weights : x, stages = behind ? a.weights_stages : a.x_stages;
      if (bytes + next > available || stages == (behind ? depth : wgmma::kMaxStages)) return bytes;
      ++(behind ? a.weights_stages : a.x_stages);
      bytes += next;
    }
  }

  // Persistent: as many clusters as the GPU holds at once, which its groups of SMs may make fewer than SMs / cluster.
  // Where K is split there are few blocks of tiles: a cluster for each.
  int clusters_at_once(const cudaLaunchConfig_t& config, const void* function, int tiles) const {
    if (plan_.split > 1) return tiles;
    if (!at_once_) {
      int clusters = 0;
      esparse_gpu gpu;
      const bool known = plan_.ctas() == 1
                             ? !esparse_current_gpu(&gpu, nullptr) && (clusters = plan_.per_sm * gpu.multiprocessors)
                             : !cudaOccupancyMaxActiveClusters(&clusters, function, &config) && clusters > 0;
      if (!known) return tiles;
      at_once_ = clusters;
    }
    return std::min<int>(tiles, at_once_);
  }

  // The tiles that are left when whole waves are done take as long as one more. Where they are at most as many as there
  // are clusters, a cluster takes one of them and splits its K, unless that is so short that the exchange costs more.
  void divide(Arguments& a, int clusters) const {
    const int blocks = a.row_clusters * a.token_clusters;
    const int left = blocks % clusters, tiles = left * a.ctas;
    const bool pays = blocks > clusters && tiles <= clusters && a.k_tiles >= kWorthSplitting * a.ctas;
    const bool fits = received_bytes(a.ctas) + wgmma::kBarriersBytes <= static_cast<int>(a.staging);
    const bool divided = a.split == 1 && a.ctas > 1 && !kernel_.pingpong && pays && fits;
    a.blocks = divided ? blocks - left : blocks;
    a.tiles = divided ? tiles : 0;
  }

  // The clusters at work read `group` x tiles and clusters / group tiles of W: about as many bytes of each is best.
  int group(const Arguments& a, int clusters) const {
    const double x = 256.0 * kernel_.tokens * plan_.share_w, w = 144.0 * kernel_.rows * plan_.share_x;
    const int best = std::max(1, static_cast<int>(std::lround(std::sqrt(clusters * w / x))));
    return count(a.token_clusters, count(a.token_clusters, best));
  }

  Kernel kernel_;
  Plan plan_;
  mutable std::atomic<int> at_once_{0};  // clusters; asked of the driver once
};

}  // namespace

// Those that were among the fastest of some shape when all combinations were timed on an H100, and splits of few large
// tiles, whose clusters run at once: of 1, 2 .. 8 CTAs it takes 132, 66, 39, 30, 22, 17, 15 and 15.
void add_wgmma(Candidates& all) {
  std::vector<Kernel> kernels;
  wgmma::add_narrow(kernels);
  wgmma::add_wide(kernels);
  const auto add = [&](int rows, int tokens, bool pingpong, std::initializer_list<Plan> plans) {
    for (const Kernel& kernel : kernels)
      if (kernel.rows == rows && kernel.tokens == tokens && kernel.pingpong == pingpong)
        for (const Plan& plan : plans)
          if (kernel.shares == plan.shares()) all.push_back(std::make_unique<WgmmaCandidate>(kernel, plan));
  };
  // split, share_x, share_w, per_sm
  add(64, 16, false, {{1, 1, 1, 2}, {2, 1, 1, 1}, {2, 1, 1, 2}});
  add(128, 16, false, {{1, 1, 1, 2}, {2, 1, 1, 1}});
  add(64, 32, false, {{1, 1, 1, 1}, {1, 1, 1, 2}, {2, 1, 1, 1}, {2, 1, 1, 2}, {4, 1, 1, 2}, {8, 1, 1, 1}});
  add(128, 32, false, {{1, 1, 1, 1}, {1, 1, 1, 2}});
  add(64, 64, false, {{1, 1, 1, 1}, {1, 1, 1, 2}, {1, 2, 1, 1}, {1, 4, 1, 1}});
  add(64, 64, false, {{2, 1, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}, {8, 1, 1, 1}, {2, 4, 1, 1}});
  add(128, 64, false, {{1, 1, 1, 1}, {1, 1, 1, 2}, {1, 2, 1, 1}, {1, 4, 1, 1}, {1, 1, 2, 1}, {1, 2, 2, 1}});
  add(128, 64, false, {{2, 1, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}, {2, 1, 2, 1}, {2, 2, 2, 1}, {3, 1, 2, 1}});
  add(192, 64, false, {{1, 1, 1, 1}, {2, 1, 1, 1}});
  add(128, 128, false, {{1, 1, 1, 1}, {1, 2, 1, 1}, {1, 4, 1, 1}, {1, 1, 2, 1}, {1, 2, 2, 1}});
  add(128, 128, false, {{2, 1, 1, 1}, {2, 2, 1, 1}, {2, 1, 2, 1}, {2, 2, 2, 1}});
  add(128, 128, false, {{3, 1, 1, 1}, {4, 1, 1, 1}, {8, 1, 1, 1}});
  add(192, 128, false, {{1, 1, 1, 1}, {1, 2, 1, 1}});
  add(192, 128, false, {{2, 1, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}, {5, 1, 1, 1}, {6, 1, 1, 1}});
  add(256, 128, false, {{1, 2, 1, 1}, {1, 1, 2, 1}});
  add(256, 128, false, {{2, 1, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}, {5, 1, 1, 1}});
  add(128, 256, false, {{1, 1, 1, 1}, {1, 2, 1, 1}, {1, 4, 1, 1}, {1, 1, 2, 1}});
  add(128, 256, false, {{2, 1, 1, 1}, {2, 4, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}});
  add(192, 256, false, {{1, 1, 1, 1}, {1, 2, 1, 1}});
  add(192, 256, false, {{2, 1, 1, 1}, {3, 1, 1, 1}, {4, 1, 1, 1}, {5, 1, 1, 1}});
  add(256, 192, false, {{1, 1, 1, 1}, {1, 2, 1, 1}, {1, 1, 2, 1}});
  add(128, 128, true, {{1, 1, 2, 1}});
  add(128, 192, true, {{1, 2, 1, 1}});
}

}  // namespace esparse
