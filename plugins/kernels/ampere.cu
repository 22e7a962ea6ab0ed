// The portable path, for every GPU that has mma.sp (compute capability 8.0): a tiled GEMM staged through shared memory
// with cp.async. Experimental: checked on an H100, never timed on the GPUs that it is for.
//
// A CTA owns a tile of rows of W by tokens and walks K in steps of kStepK. Per step it stages the tile's values
// [rows, kStepK / 2] and x [tokens, kStepK]; what lies outside is staged as zeros, so every size takes the same path.
// Metadata goes straight to registers, one word a lane for 16 rows of a step: lane 4 g + t takes the word of row g,
// h = t % 2 and the step's q = t / 2. So lanes t = 0, 1 supply its k 0-31 and lanes t = 2, 3 its k 32-63.
// mma.sp yields y^T, 16 rows x 8 tokens; shared memory turns it into rows of y, for 16-byte stores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "candidate.h"
#include "esparse/es24.h"
#include "gate.cuh"
#include "ptx.cuh"

namespace esparse {
namespace {

constexpr int kStepK = 64;
constexpr int kPad = 8;  // elements behind each row in shared memory: eight rows at one column lie in different banks

// kRowWarps x kTokenWarps warps, each with kRowBlocks x kTokenBlocks products of 16 rows x 8 tokens.
template <int kRowWarps_, int kTokenWarps, int kRowBlocks_, int kTokenBlocks_, int kStages_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_, kRowBlocks = kRowBlocks_, kTokenBlocks = kTokenBlocks_;
  static constexpr int kStages = kStages_;  // steps in shared memory, the one being multiplied among them
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  static constexpr int kRows = 16 * kRowWarps * kRowBlocks;
  static constexpr int kTokens = 8 * kTokenWarps * kTokenBlocks;

  static constexpr int kValuesPitch = kStepK / 2 + kPad, kXPitch = kStepK + kPad, kYPitch = kRows + kPad;  // elements
  static constexpr int kX = kRows * kValuesPitch;  // where x begins in a stage
  static constexpr int kStage = kX + kTokens * kXPitch;
  static constexpr int kSharedBytes = 2 * (kStages * kStage);
  static_assert(kTokens * kYPitch <= kStages * kStage, "y takes the place of the stages");
  static_assert(kSharedBytes <= 99 * 1024, "what compute capabilities 8.6 and 8.9 have");
};

// Begin to copy kRows x kColumns elements into shared memory, zeros for rows and columns that are not there.
template <int kThreads, int kRows, int kColumns, int kPitch, typename T>
__device__ void stage(uint32_t to, const T* from, int64_t pitch, int64_t rows_there, int64_t columns_there) {
  constexpr int kChunks = kColumns / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const bool there = row < rows_there && column < columns_there;
    ptx::cp_async_16(to + 2 * (row * kPitch + column), there ? from + row * pitch + column : from, there ? 16 : 0);
  }
}

// One step from shared memory: `values` and `x` are the addresses of this warp's first row and first token.
template <typename T, typename Tile>
__device__ void multiply(uint32_t values, uint32_t x, const uint32_t (&metadata)[Tile::kRowBlocks],
                         float (&sums)[Tile::kRowBlocks][Tile::kTokenBlocks][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // k 0-31, k 32-63
    uint32_t a[Tile::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i)
      ptx::ldmatrix_x4(values + 2 * ((16 * i + lane % 16) * Tile::kValuesPitch + 16 * half + lane / 16 * 8), a[i]);
#pragma unroll
    for (int j = 0; j < Tile::kTokenBlocks; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(x + 2 * ((8 * j + lane % 8) * Tile::kXPitch + 32 * half + lane / 8 * 8), b);
#pragma unroll
      for (int i = 0; i < Tile::kRowBlocks; ++i) {
        if (half == 0) ptx::mma_sp_m16n8k32<T, 0>(sums[i][j], a[i], b, metadata[i]);
        if (half == 1) ptx::mma_sp_m16n8k32<T, 1>(sums[i][j], a[i], b, metadata[i]);
      }
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ampere(esparse_gemm p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = blockIdx.x * int64_t{Tile::kRows}, first_token = blockIdx.y * int64_t{Tile::kTokens};
  const int warp_row = warp % Tile::kRowWarps * 16 * Tile::kRowBlocks;
  const int warp_token = warp / Tile::kRowWarps * 8 * Tile::kTokenBlocks;
  const T* values = static_cast<const T*>(p.values) + first_row * (p.k / 2);
  const T* x = static_cast<const T*>(p.x) + first_token * p.k;
  const int64_t steps = ceil_div(p.k, kStepK), tiles = ceil_div(p.n, kTileN);

  const auto load = [&](int64_t step) {
    if (step < steps) {
      const uint32_t to = ptx::shared_address(shared) + 2 * (step % Tile::kStages * Tile::kStage);
      const int64_t k = step * kStepK;
      stage<Tile::kThreads, Tile::kRows, kStepK / 2, Tile::kValuesPitch>(to, values + k / 2, p.k / 2,
                                                                         p.n - first_row, (p.k - k) / 2);
      stage<Tile::kThreads, Tile::kTokens, kStepK, Tile::kXPitch>(to + 2 * Tile::kX, x + k, p.k, p.m - first_token,
                                                                  p.k - k);
    }
    ptx::cp_async_commit_group();  // one group a step, empty ones too, so that counting them finds a step
  };
  const auto load_metadata = [&](int64_t step, uint32_t(&out)[Tile::kRowBlocks]) {
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
      const int64_t row = first_row + warp_row + 16 * i;
      const bool there = row < p.n && step < steps;
      const int64_t tile = step / 2 * tiles + row / 64, word = (row % 64 / 16 * 2 + t % 2) * 8 + g;
      out[i] = there ? p.metadata[(tile * 64 + word) * 4 + step % 2 * 2 + t / 2] : 0x44444444;
    }
  };

  float sums[Tile::kRowBlocks][Tile::kTokenBlocks][4] = {};
  uint32_t metadata[Tile::kRowBlocks], next_metadata[Tile::kRowBlocks];
  load_metadata(0, metadata);
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();  // the step's data are there for all, and all have left the stage that is filled next
    load(step + Tile::kStages - 1);
    load_metadata(step + 1, next_metadata);
    const uint32_t from = ptx::shared_address(shared) + 2 * (step % Tile::kStages * Tile::kStage);
    multiply<T, Tile>(from + 2 * warp_row * Tile::kValuesPitch,
                      from + 2 * (Tile::kX + warp_token * Tile::kXPitch), metadata, sums);
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) metadata[i] = next_metadata[i];
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();

  T* y = reinterpret_cast<T*>(shared);  // [tokens, rows]
  const Gate gate(p.activation);
#pragma unroll
  for (int i = 0; i < Tile::kRowBlocks; ++i) {
    const int row = warp_row + 16 * i;
    float bias[2];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int64_t n = first_row + row + 8 * upper + g;
      bias[upper] = p.bias && n < p.n ? static_cast<float>(static_cast<const T*>(p.bias)[n]) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < Tile::kTokenBlocks; ++j)
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        const float low = sums[i][j][token] + bias[0], high = sums[i][j][2 + token] + bias[1];
        T* to = y + (warp_token + 8 * j + 2 * t + token) * Tile::kYPitch + g;
        if (p.activation) {
          to[row / 2] = static_cast<T>(gate(low, high));
        } else {
          to[row] = static_cast<T>(low);
          to[row + 8] = static_cast<T>(high);
        }
      }
  }
  __syncthreads();
  const int rows_per_column = p.activation ? 2 : 1, pieces = Tile::kRows / rows_per_column / 8;
  const int64_t columns = p.n / rows_per_column, first_column = first_row / rows_per_column;
  for (int i = threadIdx.x; i < Tile::kTokens * pieces; i += Tile::kThreads) {
    const int token = i / pieces, column = i % pieces * 8;
    if (first_token + token < p.m && first_column + column < columns)
      *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + (first_token + token) * columns + first_column + column) =
          *reinterpret_cast<const uint4*>(y + token * Tile::kYPitch + column);
  }
}

template <typename Tile>
class Ampere final : public Candidate {
 public:
  std::string name() const override {
    return "ampere_" + std::to_string(Tile::kRows) + "x" + std::to_string(Tile::kTokens);
  }

  const char* unsupported(const esparse_gemm&, const esparse_gpu& gpu) const override {
    return gpu.capability < 80 ? "needs compute capability 8.0 or newer" : nullptr;
  }

  const char* launch(const esparse_gemm& p, const esparse_launch& launch) const override {
    const auto kernel = p.dtype == ESPARSE_FP16 ? ampere<__half, Tile> : ampere<__nv_bfloat16, Tile>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (!error) {
      const dim3 grid(static_cast<unsigned>(ceil_div(p.n, Tile::kRows)),
                      static_cast<unsigned>(ceil_div(p.m, Tile::kTokens)));
      kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, static_cast<cudaStream_t>(launch.stream)>>>(p);
      error = cudaGetLastError();
    }
    return error ? cudaGetErrorString(error) : nullptr;
  }
};

}  // namespace

void add_ampere(Candidates& all) {
  all.push_back(std::make_unique<Ampere<Tile<4, 1, 1, 2, 6>>>());  // 64 x 16: few tokens
  all.push_back(std::make_unique<Ampere<Tile<2, 2, 2, 4, 4>>>());  // 64 x 64
  all.push_back(std::make_unique<Ampere<Tile<4, 2, 2, 8, 3>>>());  // 128 x 128: many
}

}  // namespace esparse
