#pragma once

#include "wgmma.cuh"

namespace esparse::wgmma {

// The compiled tile of kWarpgroups x kBlocks x 64 rows and kTokens tokens, in both types; with pingpong, one of
// kBlocks x 64 rows for each warpgroup.
template <int kWarpgroups, int kBlocks, int kTokens, bool kShares = false, bool kPingpong = false>
Kernel kernel() {
  using Fp16 = Tile<__half, kWarpgroups, kBlocks, kTokens, kShares, kPingpong>;
  using Bf16 = Tile<__nv_bfloat16, kWarpgroups, kBlocks, kTokens, kShares, kPingpong>;
  return {Fp16::kRows,
          kTokens,
          kWarpgroups,
          Fp16::kLight,
          kShares,
          kPingpong,
          reinterpret_cast<const void*>(gemm<Fp16>),
          reinterpret_cast<const void*>(gemm<Bf16>)};
}

}  // namespace esparse::wgmma
