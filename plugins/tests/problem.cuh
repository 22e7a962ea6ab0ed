// A Sparse-GEMM problem made on the device, with its exact result and with traps around it.
//
// Data come from a hash of the element's index. Of the kind "integers" every sum is exact in fp32 in any order
// (|x|, |w| <= 2 and K/2 products stay below 2^24), so a correct kernel is bitwise right; "normal" is close to
// N(0, 1) x N(0, 0.05).
//
// Traps: y lies between guard bands and starts as NaN, the workspace starts as NaN and ends in a guard band, and x is
// NaN until a kernel in front of the one under test, which lets its dependents start at once, brings the data. So a
// kernel that under programmatic launch reads x or writes y before `griddepcontrol.wait` fails.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"
#include "require.h"

#define REQUIRE_CUDA(call) REQUIRE((call) == cudaSuccess)

namespace esparse_test {

enum class Numbers { integers, normal };

struct Case {
  int64_t m, n, k;
  esparse_dtype dtype;
  Numbers numbers;
  bool bias, permutation;
  esparse_activation activation = ESPARSE_NO_ACTIVATION;

  int64_t columns() const { return activation ? n / 2 : n; }  // of y
};

constexpr int64_t kGuard = 1024;  // elements of two bytes
constexpr uint16_t kPoison = 0xFFFF;  // a NaN in fp16 and in bf16
constexpr int kThreads = 256;

enum Seed : uint32_t { kSeedX = 1, kSeedValues = 2, kSeedPattern = 3, kSeedBias = 4 };

__host__ __device__ inline uint32_t hash(int64_t index, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(index) * 2654435761u ^ static_cast<uint32_t>(index >> 32) * 0x9E3779B9u ^
               seed * 0x27D4EB2Fu;
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

__device__ inline float number(int64_t index, uint32_t seed, Numbers numbers, float deviation) {
  const uint32_t h = hash(index, seed);
  if (numbers == Numbers::integers) return static_cast<float>(static_cast<int>(h % 5) - 2);
  const uint32_t sum = (h & 0xFF) + (h >> 8 & 0xFF) + (h >> 16 & 0xFF) + (h >> 24);  // of four uniform bytes
  return (static_cast<float>(sum) - 510.f) / 147.8f * deviation;
}

template <typename T>
__global__ void fill(T* out, int64_t count, uint32_t seed, Numbers numbers, float deviation) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) out[i] = static_cast<T>(number(i, seed, numbers, deviation));
}

// One thread per word; the nibbles of rows and channels that are not there are 0x4.
static __global__ void fill_metadata(int32_t* out, int64_t n, int64_t k) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= esparse::metadata_words(n, k)) return;
  const int64_t q = i % 4, g = i / 4 % 8, h = i / 32 % 2, r16 = i / 64 % 4, tiles = esparse::ceil_div(n, 64);
  const int64_t row = 64 * (i / 256 % tiles) + 16 * r16 + g, channel = 128 * (i / 256 / tiles) + 32 * q + 16 * h;
  uint32_t word = 0;
  for (int nibble = 0; nibble < 8; ++nibble) {
    const int64_t r = row + 8 * (nibble / 4), chunk = channel / 4 + nibble % 4;
    const uint32_t pair = 0xED9C84u >> 4 * (hash(r * (k / 4) + chunk, kSeedPattern) % 6) & 0xF;
    word |= (r < n && chunk < k / 4 ? pair : 0x4) << 4 * nibble;
  }
  out[i] = static_cast<int32_t>(word);
}

static __global__ void fill_permutation(int32_t* out, int64_t k, int64_t factor) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < k) out[i] = static_cast<int32_t>((i * factor + k / 3) % k);
}

template <typename T>
__device__ double exact_sum(const esparse_gemm& p, const T* x, int64_t m, int64_t n) {
  const T* values = static_cast<const T*>(p.values) + n * (p.k / 2);
  double sum = p.bias ? static_cast<double>(static_cast<float>(static_cast<const T*>(p.bias)[n])) : 0.;
  for (int64_t chunk = 0; chunk < p.k / 4; ++chunk) {
    const auto [word, shift] = esparse::metadata_bits(n, chunk, p.n);
    const int nibble = p.metadata[word] >> shift & 0xF;
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t j = 4 * chunk + (nibble >> 2 * slot & 3);
      const float value = static_cast<float>(x[m * p.k + (p.permutation ? p.permutation[j] : j)]);
      sum += static_cast<double>(value) * static_cast<float>(values[2 * chunk + slot]);
    }
  }
  return sum;
}

__device__ inline double exact_activation(esparse_activation activation, double gate) {
  if (activation == ESPARSE_SWIGLU) return gate / (1 + exp(-gate));
  return gate / 2 * (1 + tanh(sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate)));
}

// y in fp64, rounded once to fp32. Threads are 32 columns by 8 tokens, so that a row's values are read once from L1.
template <typename T>
__global__ void exact(esparse_gemm p, const T* x, float* y) {
  const int64_t columns = p.activation ? p.n / 2 : p.n;
  const int64_t n = blockIdx.x * int64_t{32} + threadIdx.x, m = blockIdx.y * int64_t{8} + threadIdx.y;
  if (n >= columns || m >= p.m) return;
  const int64_t row = p.activation ? n / 8 * 16 + n % 8 : n;
  double sum = exact_sum(p, x, m, row);
  if (p.activation) sum = exact_activation(p.activation, sum) * exact_sum(p, x, m, row + 8);
  y[m * columns + n] = static_cast<float>(sum);
}

// What runs in front of the kernel under test: x arrives, y and the workspace are poisoned, all of it late.
static __global__ void arrive(const uint16_t* x_source, uint16_t* x, int64_t x_count, uint16_t* y, int64_t y_count,
                              uint16_t* workspace, int64_t workspace_count, bool late) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  if (late) __nanosleep(2000);
#endif
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x, step = gridDim.x * int64_t{kThreads};
  for (int64_t i = first; i < y_count; i += step) y[i] = kPoison;
  for (int64_t i = first; i < workspace_count; i += step) workspace[i] = kPoison;
  for (int64_t i = first; i < x_count; i += step) x[i] = x_source[i];
}

struct Outcome {
  double difference, norm;        // sums of squares, against the exact result
  unsigned long long wrong;       // elements that are not the exact result rounded to the output's type
  unsigned long long overwritten; // elements of guard bands
};

template <typename T>
__global__ void compare(const uint16_t* y_guarded, const float* expected, int64_t count,
                        const uint16_t* workspace_guard, uint16_t* x, int64_t x_count, Outcome* outcome) {
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x, step = gridDim.x * int64_t{kThreads};
  const T* y = reinterpret_cast<const T*>(y_guarded + kGuard);
  double difference = 0, norm = 0;
  unsigned wrong = 0, overwritten = 0;
  for (int64_t i = first; i < count; i += step) {
    const float got = static_cast<float>(y[i]), want = expected[i];
    difference += (static_cast<double>(got) - want) * (static_cast<double>(got) - want);
    norm += static_cast<double>(want) * want;
    wrong += !(got == static_cast<float>(static_cast<T>(want)));
  }
  for (int64_t i = first; i < kGuard; i += step) {
    overwritten += y_guarded[i] != kPoison;
    overwritten += y_guarded[kGuard + count + i] != kPoison;
    overwritten += workspace_guard[i] != kPoison;
  }
  for (int64_t i = first; i < x_count; i += step) x[i] = kPoison;
  for (int offset = 16; offset; offset /= 2) {
    difference += __shfl_xor_sync(~0u, difference, offset);
    norm += __shfl_xor_sync(~0u, norm, offset);
    wrong += __shfl_xor_sync(~0u, wrong, offset);
    overwritten += __shfl_xor_sync(~0u, overwritten, offset);
  }
  if (threadIdx.x % 32) return;
  atomicAdd(&outcome->difference, difference);
  atomicAdd(&outcome->norm, norm);
  if (wrong) atomicAdd(&outcome->wrong, wrong);
  if (overwritten) atomicAdd(&outcome->overwritten, overwritten);
}

template <typename T>
__global__ void to_float(const uint16_t* y, float* out, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) out[i] = static_cast<float>(reinterpret_cast<const T*>(y)[i]);
}

// Stream-ordered device memory of exactly the size asked for, so that compute-sanitizer sees every step beyond it.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, cudaStream_t stream) : stream_(stream) {
    REQUIRE_CUDA(cudaMallocAsync(&data_, std::max<int64_t>(count, 1) * sizeof(T), stream));
  }
  ~Buffer() { REQUIRE_CUDA(cudaFreeAsync(data_, stream_)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  cudaStream_t stream_;
  T* data_ = nullptr;
};

class Problem {
 public:
  Problem(const Case& c, size_t workspace_bytes, cudaStream_t stream)
      : case_(c),
        stream_(stream),
        x_source_(c.m * c.k, stream),
        x_(c.m * c.k, stream),
        values_(c.n * c.k / 2, stream),
        bias_(c.n, stream),
        y_(c.m * c.columns() + 2 * kGuard, stream),
        workspace_(static_cast<int64_t>(workspace_bytes) / 2 + kGuard, stream),
        metadata_(esparse::metadata_words(c.n, c.k), stream),
        permutation_(c.k, stream),
        expected_(c.m * c.columns(), stream) {
    c.dtype == ESPARSE_FP16 ? make<__half>() : make<__nv_bfloat16>();
  }

  esparse_gemm gemm() const {
    esparse_gemm p{};
    p.m = case_.m, p.n = case_.n, p.k = case_.k, p.dtype = case_.dtype, p.activation = case_.activation;
    p.x = x_.get(), p.values = values_.get(), p.metadata = metadata_.get(), p.y = y_.get() + kGuard;
    if (case_.bias) p.bias = bias_.get();
    if (case_.permutation) p.permutation = permutation_.get();
    return p;
  }

  void* workspace() const { return workspace_.get(); }

  // Enqueue what must precede the kernel under test, which uses `workspace_bytes` of the workspace.
  void before(size_t workspace_bytes, bool programmatic) const {
    const int64_t y_count = case_.m * case_.columns() + 2 * kGuard, workspace_count = workspace_bytes / 2 + kGuard;
    arrive<<<blocks(std::max(y_count, case_.m * case_.k)), kThreads, 0, stream_>>>(
        x_source_.get(), x_.get(), case_.m * case_.k, y_.get(), y_count, workspace_.get(), workspace_count,
        programmatic);
  }

  // From now on the present output is what every later one is compared with.
  void expect_present_output() const {
    const auto kernel = case_.dtype == ESPARSE_FP16 ? to_float<__half> : to_float<__nv_bfloat16>;
    const int64_t count = case_.m * case_.columns();
    kernel<<<static_cast<unsigned>(esparse::ceil_div(count, kThreads)), kThreads, 0, stream_>>>(y_.get() + kGuard,
                                                                                                expected_.get(), count);
  }

  // Enqueue the comparison; `outcome` is on the device, zeroed by the caller.
  void after(size_t workspace_bytes, Outcome* outcome) const {
    const auto kernel = case_.dtype == ESPARSE_FP16 ? compare<__half> : compare<__nv_bfloat16>;
    const int64_t count = case_.m * case_.columns();
    kernel<<<blocks(count), kThreads, 0, stream_>>>(y_.get(), expected_.get(), count,
                                                    workspace_.get() + workspace_bytes / 2, x_.get(),
                                                    case_.m * case_.k, outcome);
  }

 private:
  static unsigned blocks(int64_t count) {
    return static_cast<unsigned>(std::min<int64_t>(esparse::ceil_div(count, 4 * kThreads), 1024));
  }

  template <typename T>
  void make() {
    const auto grid = [](int64_t count) { return static_cast<unsigned>(esparse::ceil_div(count, kThreads)); };
    const auto typed = [](const auto& buffer) { return reinterpret_cast<T*>(buffer.get()); };
    const auto [m, n, k, dtype, numbers, bias, permutation, activation] = case_;
    fill<<<grid(m * k), kThreads, 0, stream_>>>(typed(x_source_), m * k, kSeedX, numbers, 1.f);
    fill<<<grid(n * k / 2), kThreads, 0, stream_>>>(typed(values_), n * k / 2, kSeedValues, numbers, 0.05f);
    fill<<<grid(n), kThreads, 0, stream_>>>(typed(bias_), n, kSeedBias, numbers, 1.f);
    fill_metadata<<<grid(esparse::metadata_words(n, k)), kThreads, 0, stream_>>>(metadata_.get(), n, k);
    int64_t factor = k * 5 / 8 + 1;
    while (std::gcd(factor, k) != 1) ++factor;
    fill_permutation<<<grid(k), kThreads, 0, stream_>>>(permutation_.get(), k, factor);
    const dim3 threads(32, 8), tiles(static_cast<unsigned>(esparse::ceil_div(case_.columns(), 32)),
                                     static_cast<unsigned>(esparse::ceil_div(m, 8)));
    exact<T><<<tiles, threads, 0, stream_>>>(gemm(), typed(x_source_), expected_.get());
    REQUIRE_CUDA(cudaMemsetAsync(x_.get(), 0xFF, m * k * 2, stream_));
    REQUIRE_CUDA(cudaGetLastError());
  }

  Case case_;
  cudaStream_t stream_;
  Buffer<uint16_t> x_source_, x_, values_, bias_, y_, workspace_;
  Buffer<int32_t> metadata_, permutation_;
  Buffer<float> expected_;
};

}  // namespace esparse_test
