// The compressed layout es24-v1 (DESIGN section 7): where each value and each metadata bit lies.
//
// values   [N, K/2] row-major: the two kept values of every 4 consecutive k ("chunk"), ascending in k.
// metadata int32 [ceil(K/128), ceil(N/64), 4, 2, 8, 4], indexed (kt, nt, r16, h, g, q). One word describes rows
//          n = 64 nt + 16 r16 + g (bits 0-15) and n + 8 (bits 16-31) for the 16 k from 128 kt + 32 q + 16 h; its
//          nibble c, least significant first, describes chunk c as i0 | i1 << 2 with i0 < i1.
//
// These are the words that mma.sp.m16n8k32 consumes, in the order of the CUTLASS sm90 sparse metadata atom.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ESPARSE_HOST_DEVICE __host__ __device__
#else
#define ESPARSE_HOST_DEVICE
#endif

namespace esparse {

constexpr int64_t kTileK = 128;  // k per metadata tile
constexpr int64_t kTileN = 64;   // rows per metadata tile

ESPARSE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// int32 words of metadata, padding included.
ESPARSE_HOST_DEVICE constexpr int64_t metadata_words(int64_t n, int64_t k) {
  return ceil_div(k, kTileK) * ceil_div(n, kTileN) * (kTileK * kTileN / 32);
}

struct MetadataBits {
  int64_t word;  // index into the metadata
  int shift;     // first of the nibble's four bits
};

// Where the nibble of row `n` and chunk `chunk` (k = 4 chunk .. 4 chunk + 3) lies, for a layer of `rows` rows.
ESPARSE_HOST_DEVICE constexpr MetadataBits metadata_bits(int64_t n, int64_t chunk, int64_t rows) {
  const int64_t k = 4 * chunk;
  const int64_t kt = k / kTileK, q = k % kTileK / 32, h = k % 32 / 16, c = k % 16 / 4;
  const int64_t nt = n / kTileN, r16 = n % kTileN / 16, g = n % 8, upper = n % 16 / 8;
  const int64_t word = ((((kt * ceil_div(rows, kTileN) + nt) * 4 + r16) * 2 + h) * 8 + g) * 4 + q;
  return {word, static_cast<int>(16 * upper + 4 * c)};
}

}  // namespace esparse
