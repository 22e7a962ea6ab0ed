// x with its channels in the order of the weights, for kernels that do not gather while they load.
#include "permute.h"

#include <cstdint>

#include "esparse/es24.h"

namespace esparse {
namespace {

// One CTA per token and stretch of channels. Eight channels a thread, so that stores are 16 bytes wide; the scattered
// 2-byte loads of one token's row hit L1.
constexpr int kThreads = 128;
constexpr int kPerThread = 8;

__global__ void __launch_bounds__(kThreads) permute(const uint16_t* x, const int32_t* permutation, uint16_t* out, int64_t k) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int64_t j = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kPerThread;
  int4 from[2] = {};
  if (j < k) {
    from[0] = *reinterpret_cast<const int4*>(permutation + j);
    from[1] = *reinterpret_cast<const int4*>(permutation + j + 4);
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (j >= k) return;
  const uint16_t* row = x + blockIdx.x * k;
  const auto pair = [&](int low, int high) { return row[low] | uint32_t{row[high]} << 16; };
  *reinterpret_cast<uint4*>(out + blockIdx.x * k + j) = {pair(from[0].x, from[0].y), pair(from[0].z, from[0].w),
                                                         pair(from[1].x, from[1].y), pair(from[1].z, from[1].w)};
}

}  // namespace

const char* permute_columns(const esparse_gemm& problem, void* out, const esparse_launch& launch) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(problem.m), static_cast<unsigned>(ceil_div(problem.k, kThreads * kPerThread))};
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = launch.programmatic ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, permute, static_cast<const uint16_t*>(problem.x),
                                               problem.permutation, static_cast<uint16_t*>(out), problem.k);
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace esparse
