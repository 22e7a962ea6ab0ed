// The reference: one thread per output, fp32 sums in ascending k, reading the compressed weights as they lie; with an
// activation, two such sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>

#include "candidate.h"
#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"

namespace {

// The sum of token m and row n of W, and the bias.
template <typename T>
__device__ float sum_of(const esparse_gemm& p, int64_t m, int64_t n) {
  const T* x = static_cast<const T*>(p.x) + m * p.k;
  const T* values = static_cast<const T*>(p.values) + n * (p.k / 2);
  float sum = p.bias ? static_cast<float>(static_cast<const T*>(p.bias)[n]) : 0.f;
  for (int64_t chunk = 0; chunk < p.k / 4; ++chunk) {
    const auto [word, shift] = esparse::metadata_bits(n, chunk, p.n);
    const int nibble = p.metadata[word] >> shift & 0xF;
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t k = 4 * chunk + (nibble >> 2 * slot & 3);
      const int64_t source = p.permutation ? p.permutation[k] : k;
      sum += static_cast<float>(x[source]) * static_cast<float>(values[2 * chunk + slot]);
    }
  }
  return sum;
}

// In the form of gate.cuh, with exact functions: 1 + tanh would lose its digits where gate is negative.
__device__ float activate(esparse_activation activation, float gate) {
  if (activation == ESPARSE_SWIGLU) return gate / (1.f + expf(-gate));
  return gate / (1.f + expf(-2.f * .797884561f * (gate + .044715f * gate * gate * gate)));
}

template <typename T>
__global__ void reference(esparse_gemm p) {
  const int64_t columns = p.activation ? p.n / 2 : p.n;
  const int64_t m = blockIdx.x, n = blockIdx.y * int64_t{blockDim.x} + threadIdx.x;
  if (n >= columns) return;
  float y;
  if (p.activation) {
    const int64_t row = n / 8 * 16 + n % 8;
    y = activate(p.activation, sum_of<T>(p, m, row)) * sum_of<T>(p, m, row + 8);
  } else {
    y = sum_of<T>(p, m, n);
  }
  static_cast<T*>(p.y)[m * columns + n] = static_cast<T>(y);
}

const char* launch_reference(const esparse_gemm& p, cudaStream_t stream) {
  const dim3 block(128);
  const dim3 grid(static_cast<unsigned>(p.m), static_cast<unsigned>(esparse::ceil_div(p.n, block.x)));
  const auto kernel = p.dtype == ESPARSE_FP16 ? reference<__half> : reference<__nv_bfloat16>;
  kernel<<<grid, block, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}

class Reference final : public esparse::Candidate {
 public:
  std::string name() const override { return "reference"; }
  const char* unsupported(const esparse_gemm&, const esparse_gpu&) const override { return nullptr; }
  bool reads_permuted() const override { return true; }
  const char* launch(const esparse_gemm& problem, const esparse_launch& launch) const override {
    return launch_reference(problem, static_cast<cudaStream_t>(launch.stream));
  }
};

}  // namespace

void esparse::add_reference(Candidates& all) { all.push_back(std::make_unique<Reference>()); }

esparse_status esparse_gemm_reference(const esparse_gemm* problem, void* stream, esparse_message* message) {
  if (const esparse_status status = esparse_check(problem, message); status != ESPARSE_SUCCESS) return status;
  if (const char* error = launch_reference(*problem, static_cast<cudaStream_t>(stream))) {
    if (message) std::snprintf(message->text, sizeof message->text, "launch: %s", error);
    return ESPARSE_CUDA_ERROR;
  }
  return ESPARSE_SUCCESS;
}
