// Host-only checks: every argument error is reported by name and value, and the metadata layout is a bijection.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"
#include "require.h"

namespace {

alignas(16) char buffer[32];

esparse_gemm valid() {
  esparse_gemm p{};
  p.m = 1, p.n = 64, p.k = 128, p.dtype = ESPARSE_FP16;
  p.x = p.values = p.y = buffer;
  p.metadata = reinterpret_cast<const int32_t*>(buffer);
  return p;
}

void expect(const esparse_gemm& problem, esparse_status status, const char* words) {
  esparse_message message{};
  REQUIRE(esparse_check(&problem, &message) == status);
  REQUIRE(esparse_check(&problem, nullptr) == status);
  REQUIRE(std::strstr(message.text, words) != nullptr);
}

void test_arguments() {
  REQUIRE(esparse_check(nullptr, nullptr) == ESPARSE_INVALID_ARGUMENT);
  expect(valid(), ESPARSE_SUCCESS, "");
  auto p = valid();
  p.m = 65537, expect(p, ESPARSE_INVALID_ARGUMENT, "m is 65537");
  p = valid(), p.n = 12, expect(p, ESPARSE_NOT_SUPPORTED, "n is 12");
  p = valid(), p.k = 48, expect(p, ESPARSE_NOT_SUPPORTED, "k is 48");
  p = valid(), p.dtype = static_cast<esparse_dtype>(7), expect(p, ESPARSE_INVALID_ARGUMENT, "dtype is 7");
  p = valid(), p.activation = static_cast<esparse_activation>(3);
  expect(p, ESPARSE_INVALID_ARGUMENT, "activation is 3");
  p = valid(), p.n = 72, p.activation = ESPARSE_SWIGLU, expect(p, ESPARSE_NOT_SUPPORTED, "n is 72");
  p = valid(), p.activation = ESPARSE_GEGLU, expect(p, ESPARSE_SUCCESS, "");
  p = valid(), p.x = nullptr, expect(p, ESPARSE_INVALID_ARGUMENT, "x is null");
  p = valid(), p.y = buffer + 2, expect(p, ESPARSE_INVALID_ARGUMENT, "y is");
  p = valid(), p.metadata = nullptr, expect(p, ESPARSE_INVALID_ARGUMENT, "metadata is null");
  p = valid(), p.bias = buffer, p.permutation = reinterpret_cast<const int32_t*>(buffer);
  expect(p, ESPARSE_SUCCESS, "");
  p = valid(), p.bias = buffer + 8, expect(p, ESPARSE_INVALID_ARGUMENT, "bias is");
  p = valid(), p.permutation = reinterpret_cast<const int32_t*>(buffer + 4);
  expect(p, ESPARSE_INVALID_ARGUMENT, "permutation is");
  // An invalid problem never reaches the device, so this needs no GPU.
  p = valid(), p.values = buffer + 8;
  REQUIRE(esparse_gemm_reference(&p, nullptr, nullptr) == ESPARSE_INVALID_ARGUMENT);
}

// Every (row, chunk) owns four bits that no other owns; with N % 64 == 0 and K % 128 == 0 none are left over.
void test_layout_is_a_bijection(int64_t n, int64_t k) {
  const int64_t words = esparse_metadata_words(n, k);
  std::vector<uint32_t> owned(words, 0);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t chunk = 0; chunk < k / 4; ++chunk) {
      const auto bits = esparse::metadata_bits(row, chunk, n);
      REQUIRE(bits.word >= 0 && bits.word < words);
      REQUIRE((owned[bits.word] >> bits.shift & 0xF) == 0);
      owned[bits.word] |= 0xFu << bits.shift;
    }
  if (n % 64 == 0 && k % 128 == 0) {
    REQUIRE(words == n * k / 32);
    for (const uint32_t word : owned) REQUIRE(word == 0xFFFFFFFFu);
  }
}

}  // namespace

int main() {
  test_arguments();
  for (const int64_t n : {8, 64, 72, 192})
    for (const int64_t k : {32, 128, 160, 512}) test_layout_is_a_bijection(n, k);
  REQUIRE(esparse_metadata_words(12, 128) == 0);
  REQUIRE(esparse_metadata_words(64, 40) == 0);
  std::puts("abi: passed");
}
