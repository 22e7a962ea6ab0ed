// Sizes of the decode kernels, shared by host and device. See decode.cuh.
#pragma once

#include <cstdint>

#include "esparse/es24.h"

namespace esparse::decode {

constexpr int kWarpRows = 16;
constexpr int kValuesBytes = kWarpRows * kTileK;        // of a warp's tile: 64 values of 2 bytes a row
constexpr int kMetadataBytes = kWarpRows * kTileK / 8;  // 4 bits for every 4 k
constexpr int kStageBytes = kValuesBytes + kMetadataBytes;
constexpr int kXTileBytes = 2 * kTileK;  // of one token's row

template <int kRowWarps_, int kDepthWarps_, int kStages_>
struct Config {
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kDepthWarps = kDepthWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = kRowWarps * kWarpRows;
  static constexpr int kThreads = kRowWarps * kDepthWarps * 32;
  static constexpr int kRingBytes = kRowWarps * kDepthWarps * kStages * kStageBytes;
};

// What the host computes once: divisions are slow at the start of a kernel that takes microseconds.
struct Plan {
  int log_splits;       // of K
  int log_owned;        // rows that a CTA owns after the exchange of sums
  int x_stride;         // bytes of a token's row in shared memory: its tiles and 16 bytes, see above
  int partials_stride;  // floats of a token's row of partial sums: 4 more than rows, for stores without conflicts
  int partials_bytes;   // of one buffer: there are two where CTAs take more than one row block
  int pushed_bytes;     // of partial sums of a row block that a CTA receives
  int early;            // stages that are asked for before x: all under programmatic launch, otherwise none
  int barriers, partials, x, bytes;  // dynamic shared memory, offsets in bytes
};

template <typename C>
Plan plan(int64_t m, int64_t k, int log_splits, int buffers) {
  const int splits = 1 << log_splits, tokens = static_cast<int>(m);
  const int tiles = static_cast<int>(ceil_div(ceil_div(k, kTileK), splits));
  Plan at{};
  at.log_splits = log_splits;
  while (C::kRows >> log_splits >> at.log_owned > 1) ++at.log_owned;
  at.x_stride = tiles * kXTileBytes + 16;
  at.partials_stride = C::kRows / splits + 4;
  at.barriers = C::kRingBytes;
  at.partials = at.barriers + 32;
  at.partials_bytes = splits * C::kDepthWarps * tokens * at.partials_stride * 4;
  at.pushed_bytes = C::kDepthWarps * tokens * C::kRows * 4;
  at.x = at.partials + buffers * at.partials_bytes;
  at.bytes = at.x + tokens * at.x_stride;
  return at;
}

}  // namespace esparse::decode
