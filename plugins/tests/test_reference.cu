// The reference kernel against a dense product on the host: small integers, so that every sum is exact.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"
#include "require.h"

namespace {

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* device = nullptr;
  REQUIRE(cudaMalloc(&device, host.size() * sizeof(T)) == cudaSuccess);
  REQUIRE(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return device;
}

double activated(esparse_activation activation, double gate) {
  if (activation == ESPARSE_SWIGLU) return gate / (1 + std::exp(-gate));
  return gate / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate)));
}

template <typename T>
void test(int64_t m, int64_t n, int64_t k, esparse_dtype dtype, bool with_bias, bool with_permutation,
          esparse_activation activation) {
  std::mt19937 random(static_cast<unsigned>(m * 1000003 + n * 1009 + k));
  const auto integer = [&] { return static_cast<float>(static_cast<int>(random() % 7) - 3); };

  std::vector<T> x(m * k), values(n * k / 2), bias(n), y(m * n, T(NAN));
  std::vector<float> dense(n * k, 0.f);
  std::vector<int32_t> metadata(esparse_metadata_words(n, k), 0x44444444), permutation(k);
  for (auto& value : x) value = T(integer());
  for (auto& value : bias) value = T(integer());
  std::iota(permutation.begin(), permutation.end(), 0);
  if (with_permutation) std::shuffle(permutation.begin(), permutation.end(), random);

  constexpr int kPairs[6] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};  // i0 | i1 << 2 with i0 < i1
  for (int64_t row = 0; row < n; ++row)
    for (int64_t chunk = 0; chunk < k / 4; ++chunk) {
      const int pair = kPairs[random() % 6];
      const auto bits = esparse::metadata_bits(row, chunk, n);
      metadata[bits.word] = (metadata[bits.word] & ~(0xF << bits.shift)) | pair << bits.shift;
      for (int slot = 0; slot < 2; ++slot) {
        const float value = integer();
        values[row * k / 2 + 2 * chunk + slot] = T(value);
        dense[row * k + 4 * chunk + (pair >> 2 * slot & 3)] = value;
      }
    }

  esparse_gemm p{};
  p.m = m, p.n = n, p.k = k, p.dtype = dtype, p.activation = activation;
  p.x = to_device(x), p.values = to_device(values), p.metadata = to_device(metadata), p.y = to_device(y);
  if (with_bias) p.bias = to_device(bias);
  if (with_permutation) p.permutation = to_device(permutation);
  esparse_message message{};
  REQUIRE(esparse_gemm_reference(&p, nullptr, &message) == ESPARSE_SUCCESS);
  REQUIRE(cudaMemcpy(y.data(), p.y, y.size() * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);

  const auto sum = [&](int64_t i, int64_t j) {
    float sum = with_bias ? static_cast<float>(bias[j]) : 0.f;
    for (int64_t l = 0; l < k; ++l) sum += static_cast<float>(x[i * k + permutation[l]]) * dense[j * k + l];
    return sum;
  };
  const int64_t columns = activation ? n / 2 : n;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float got = static_cast<float>(y[i * columns + j]);
      if (activation) {
        const int64_t row = j / 8 * 16 + j % 8;
        const double want = activated(activation, sum(i, row)) * sum(i, row + 8);
        REQUIRE(std::abs(got - want) <= 1e-6 + (dtype == ESPARSE_FP16 ? 6e-4 : 5e-3) * std::abs(want));
      } else {
        REQUIRE(got == static_cast<float>(T(sum(i, j))));
      }
    }
  for (const void* pointer : {p.x, p.values, static_cast<const void*>(p.metadata), p.bias,
                              static_cast<const void*>(p.permutation), static_cast<const void*>(p.y)})
    REQUIRE(cudaFree(const_cast<void*>(pointer)) == cudaSuccess);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("reference: skipped, no GPU");
    return 77;
  }
  for (const int64_t m : {1, 3, 17})
    for (const int64_t n : {8, 80, 136})
      for (const int64_t k : {32, 128, 416})
        for (const int variant : {0, 1, 2, 3})
          for (const auto activation : {ESPARSE_NO_ACTIVATION, ESPARSE_SWIGLU, ESPARSE_GEGLU}) {
            if (activation && n % 16) continue;
            test<__half>(m, n, k, ESPARSE_FP16, variant & 1, variant & 2, activation);
            test<__nv_bfloat16>(m, n, k, ESPARSE_BF16, variant & 1, variant & 2, activation);
          }
  std::puts("reference: passed");
}
