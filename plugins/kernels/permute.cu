// x with its channels in the order of the weights, for kernels that do not gather while they load.
#include "permute.h"

#include <cstdint>

namespace esparse {
namespace {

// One CTA per token. Its row is staged in shared memory, where scattered 2-byte loads meet in about three of 32 banks;
// from L1 they would take a cycle for nearly every lane.
constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // channels, so that global accesses are 16 bytes wide

__global__ void __launch_bounds__(kThreads) permute(const uint4* x, const int4* permutation, uint4* out, int pieces) {
  extern __shared__ uint4 staged[];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int64_t row = blockIdx.x * int64_t{pieces};
  for (int i = threadIdx.x; i < pieces; i += kThreads) staged[i] = x[row + i];
  __syncthreads();
  const auto* channels = reinterpret_cast<const uint16_t*>(staged);
  const auto pair = [&](int low, int high) { return channels[low] | uint32_t{channels[high]} << 16; };
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    const int4 low = permutation[2 * i], high = permutation[2 * i + 1];
    out[row + i] = {pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w)};
  }
}

}  // namespace

const char* permute_columns(const esparse_gemm& problem, void* out, const esparse_launch& launch) {
  const int row_bytes = static_cast<int>(problem.k * sizeof(uint16_t));
  cudaError_t error = cudaFuncSetAttribute(permute, cudaFuncAttributeMaxDynamicSharedMemorySize, row_bytes);
  if (error) return cudaGetErrorString(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(problem.m);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = row_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = launch.programmatic ? 1 : 0;
  error = cudaLaunchKernelEx(&config, permute, static_cast<const uint4*>(problem.x),
                             reinterpret_cast<const int4*>(problem.permutation), static_cast<uint4*>(out),
                             static_cast<int>(problem.k / kPerThread));
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace esparse
