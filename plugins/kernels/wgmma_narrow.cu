// Tiles for few tokens: weights stream once, latency and the bytes in flight decide.
#include "wgmma_instance.cuh"

void esparse::wgmma::add_narrow(std::vector<Kernel>& kernels) {
  kernels.push_back(kernel<1, 1, 16>());
  kernels.push_back(kernel<2, 1, 16>());
  kernels.push_back(kernel<1, 1, 32>());
  kernels.push_back(kernel<2, 1, 32>());
  kernels.push_back(kernel<1, 1, 64>());
  kernels.push_back(kernel<1, 1, 64, true>());
  kernels.push_back(kernel<2, 1, 64>());
  kernels.push_back(kernel<2, 1, 64, true>());
  kernels.push_back(kernel<3, 1, 64>());
}
