#include "decode.cuh"

#include <algorithm>
#include <initializer_list>

#include "candidate.h"
#include "launch.h"

namespace esparse::decode {
namespace {

constexpr int64_t kMaxWeights = int64_t{1} << 36;
constexpr int kMaxSharedBytes = 227 * 1024;

// Of an SM, and what a CTA takes of them.
constexpr int kSmSharedBytes = 228 * 1024;
constexpr int kReservedSharedBytes = 1024;
constexpr int kSmThreads = 1024;  // at 64 registers each

using Kernel = void (*)(esparse_gemm, Plan);

template <typename C, bool kGated>
Kernel kernel_of(const esparse_gemm& p) {
  if (p.dtype == ESPARSE_FP16) return p.m <= 8 ? decode<__half, C, 1, kGated> : decode<__half, C, 2, kGated>;
  return p.m <= 8 ? decode<__nv_bfloat16, C, 1, kGated> : decode<__nv_bfloat16, C, 2, kGated>;
}

template <typename C>
Kernel kernel_for(const esparse_gemm& p) {
  return p.activation ? kernel_of<C, true>(p) : kernel_of<C, false>(p);
}

template <typename C>
class Decode final : public Candidate {
 public:
  explicit Decode(int log_splits) : log_splits_(log_splits) {}

  std::string name() const override {
    return "decode_r" + std::to_string(C::kRowWarps) + "k" + std::to_string(C::kDepthWarps) + "u" +
           std::to_string(C::kStages) + "_s" + std::to_string(1 << log_splits_);
  }

  const char* unsupported(const esparse_gemm& p, const esparse_gpu& gpu) const override {
    if (gpu.capability != 90) return "needs compute capability 9.0";
    if (p.m > 16) return "m is more than 16";
    if (p.n > kMaxWeights / p.k) return "more weights than 32-bit offsets of 16 bytes reach";
    if (ceil_div(p.k, kTileK) < 1 << log_splits_) return "k is too small for the splits";
    if (p.activation && C::kRows >> log_splits_ < 16) return "a CTA adds fewer than the 16 rows of gate and up";
    if (plan<C>(p.m, p.k, log_splits_, 1).bytes > kMaxSharedBytes) return "x does not fit in shared memory";
    return nullptr;
  }

  bool reads_permuted() const override { return true; }

  const char* launch(const esparse_gemm& p, const esparse_launch& launch) const override {
    esparse_gpu gpu;
    if (esparse_current_gpu(&gpu, nullptr)) return "no GPU";

    // More row blocks than fit at once: every CTA takes the same number of them, with its x loaded once.
    const int64_t blocks = ceil_div(p.n, C::kRows);
    const int64_t rounds = rounds_for(p, blocks, gpu.multiprocessors);
    Plan at = plan<C>(p.m, p.k, log_splits_, rounds > 1 ? 2 : 1);
    at.early = launch.programmatic ? C::kStages : 0;
    const unsigned splits = 1u << log_splits_;
    cudaLaunchAttribute attributes[2]{};
    int count = 0;  // an attribute costs half a microsecond: none that changes nothing
    if (launch.programmatic) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (splits > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {1, splits, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = {static_cast<unsigned>(ceil_div(blocks, rounds)), splits};
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = at.bytes;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    config.attrs = attributes;
    config.numAttrs = count;
    const Kernel kernel = kernel_for<C>(p);
    cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), kMaxSharedBytes);
    if (!error) error = cudaLaunchKernelEx(&config, kernel, p, at);
    return error ? cudaGetErrorString(error) : nullptr;
  }

 private:
  int64_t rounds_for(const esparse_gemm& p, int64_t blocks, int multiprocessors) const {
    const int bytes = plan<C>(p.m, p.k, log_splits_, 2).bytes;
    if (bytes > kMaxSharedBytes) return 1;
    const int per_sm = std::min(kSmSharedBytes / (bytes + kReservedSharedBytes), kSmThreads / C::kThreads);
    return ceil_div(blocks << log_splits_, int64_t{multiprocessors} * per_sm);
  }

  int log_splits_;
};

template <typename C>
void add(Candidates& all, std::initializer_list<int> splits) {
  for (const int log_splits : splits) all.push_back(std::make_unique<Decode<C>>(log_splits));
}

}  // namespace
}  // namespace esparse::decode

// Of all splits of thirteen configurations, those that it takes to be within 2% of the best everywhere: M = 1, 8, 16 on
// ten shapes of an H100, with and without programmatic launch. Splits by their logarithm.
void esparse::add_decode(Candidates& all) {
  using decode::Config;
  decode::add<Config<1, 8, 4>>(all, {0, 1});
  decode::add<Config<1, 8, 8>>(all, {0, 1});
  decode::add<Config<2, 4, 6>>(all, {0, 1});
  decode::add<Config<2, 4, 8>>(all, {0, 1});
  decode::add<Config<4, 2, 4>>(all, {0, 1, 2});
  decode::add<Config<4, 2, 6>>(all, {1, 2});
  decode::add<Config<8, 1, 3>>(all, {0, 3});
  decode::add<Config<8, 1, 4>>(all, {0, 1});
  decode::add<Config<8, 1, 6>>(all, {0, 1, 2});
  decode::add<Config<8, 1, 8>>(all, {0, 2});
  decode::add<Config<16, 1, 2>>(all, {2, 3});
  decode::add<Config<16, 1, 4>>(all, {2});
}
