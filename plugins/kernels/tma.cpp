#include "tma.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

namespace esparse {
namespace {

// The driver's function, through the runtime: linking libcuda would keep the library from loading without a driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
  }();
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

const char* encode_tensor_map(const TensorBox& tensor, CUtensorMap* map) {
  if (!encoder()) return "the driver has no cuTensorMapEncodeTiled: CUDA 12.0 or newer is needed";
  constexpr cuuint32_t kSteps[3] = {1, 1, 1};
  const CUresult result =
      encoder()(map, tensor.type, static_cast<cuuint32_t>(tensor.rank), const_cast<void*>(tensor.address), tensor.size,
                tensor.stride_bytes, tensor.box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor map";
}

}  // namespace esparse
