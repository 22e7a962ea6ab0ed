// Tiles for many tokens: bytes of shared memory per wgmma decide, so they are as large as the registers allow.
#include "wgmma_instance.cuh"

void esparse::wgmma::add_wide(std::vector<Kernel>& kernels) {
  kernels.push_back(kernel<2, 1, 128>());
  kernels.push_back(kernel<2, 1, 128, true>());
  kernels.push_back(kernel<2, 2, 128>());
  kernels.push_back(kernel<2, 2, 128, true>());
  kernels.push_back(kernel<3, 1, 128>());
  kernels.push_back(kernel<3, 1, 128, true>());
  kernels.push_back(kernel<3, 1, 256>());
  kernels.push_back(kernel<3, 1, 256, true>());
  kernels.push_back(kernel<2, 1, 256>());
  kernels.push_back(kernel<2, 1, 256, true>());
  kernels.push_back(kernel<2, 2, 192>());
  kernels.push_back(kernel<2, 2, 192, true>());
  kernels.push_back(kernel<2, 2, 128, true, true>());
  kernels.push_back(kernel<2, 2, 192, true, true>());
}
