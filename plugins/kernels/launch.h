// What launches ask of the driver, remembered: such a call takes 0.4 us, a launch 3.
#pragma once

#include <cuda_runtime_api.h>

namespace esparse {

// Lets a kernel have `bytes` of dynamic shared memory on the current device, where every kernel may have 48 KiB.
cudaError_t allow_shared_memory(const void* kernel, int bytes);

}  // namespace esparse
