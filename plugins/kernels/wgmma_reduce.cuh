// The sum over the CTAs of a cluster that split a tile's K, through each other's shared memory.
#pragma once

#include "wgmma_consumer.cuh"

namespace esparse::wgmma::detail {

template <class Tile>
constexpr int kColumnBytes = Tile::kBlocks * 128 * 16;  // of a warpgroup's sums in a column of 8 tokens

// Where a part of K receives what this thread holds from the `slot`-th of the other parts, of the first of its columns.
template <class Tile>
__device__ uint32_t received(const Consumer<Tile>& c, int slot) {
  const Shares& shares = c.cta.a.column_shares;
  const int columns = shares.each + (shares.rest > 0);
  return c.cta.shared + c.cta.a.received + c.thread % 128 * 16 +
         (slot * Tile::kWarpgroups + c.warpgroup) * columns * kColumnBytes<Tile>;
}

// Give each of the other parts its columns of this one's sums. A loop over the parts would be less code, but each part
// needs about as many instructions as a column, most of which the compiler works out here.
template <class Tile>
__device__ void send(Consumer<Tile>& c, const Work& work) {
  const auto& cta = c.cta;
  const Shares& shares = cta.a.column_shares;
  const uint32_t at_lower = received(c, work.part - 1), at_higher = received(c, work.part);  // parts than this one
  int owner = 0, first = 0, end = shares.begin(1);
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) {
    if (j == end) {
      first = end;
      end += shares.each + (++owner < shares.rest);
    }
    if (owner == work.part) continue;
    const uint32_t barrier = ptx::mapa(cta.reduced(), (cta.rank & (work.tiles - 1)) + work.tiles * owner);
    const uint32_t here = (owner < work.part ? at_lower : at_higher) + (j - first) * kColumnBytes<Tile>;
    const uint32_t to = here - cta.reduced() + barrier;
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b)
      ptx::st_async_v4(to + b * 2048, c.at(b, 4 * j), c.at(b, 4 * j + 1), c.at(b, 4 * j + 2), c.at(b, 4 * j + 3),
                       barrier);
  }
}

// Add the other parts' sums in their order. Afterwards they are whole in this CTA's own columns.
template <class Tile>
__device__ void reduce(Consumer<Tile>& c, const Work& work) {
  const auto& cta = c.cta;
  const int first = cta.a.column_shares.begin(work.part);
  const int end = cta.a.column_shares.begin(work.part + 1);
  if (c.thread == 0)
    ptx::mbarrier_arrive_expect_tx(cta.reduced(), (end - first) * Tile::kRows * 8 * 4 * (work.parts - 1));
  send(c, work);
  if (first == end) return;
  while (!ptx::mbarrier_try_wait_parity_cluster(cta.reduced(), 0)) {
  }
#pragma unroll Tile::kColumns <= 4 ? 4 : 1  // few columns have many parts, whose loads overlap then
  for (int slot = 0; slot + 1 < work.parts; ++slot) {
    const uint32_t from = received(c, slot) - first * kColumnBytes<Tile>;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      if (j < first || j >= end) continue;
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b) {
        const uint4 sums = ptx::ld_shared_v4(from + j * kColumnBytes<Tile> + b * 2048);
        c.at(b, 4 * j) += __uint_as_float(sums.x);
        c.at(b, 4 * j + 1) += __uint_as_float(sums.y);
        c.at(b, 4 * j + 2) += __uint_as_float(sums.z);
        c.at(b, 4 * j + 3) += __uint_as_float(sums.w);
      }
    }
  }
}

}  // namespace esparse::wgmma::detail
