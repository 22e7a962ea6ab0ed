// The sum over the CTAs of a cluster that split a tile's K, through each other's shared memory.
#pragma once

#include "wgmma_consumer.cuh"

namespace esparse::wgmma::detail {

template <class Tile>
constexpr int kColumnBytes = Tile::kBlocks * 128 * 16;  // of a warpgroup's sums in a column of 8 tokens

// Where part `to` of K, whose columns begin with `first`, receives this thread's sums from part `from`: those
// of column j are j columns further on.
template <class Tile>
__device__ uint32_t received(const Consumer<Tile>& c, int from, int to, int first) {
  const Shares& shares = c.cta.a.column_shares;
  const int slot = from < to ? from : from - 1, columns = shares.each + (shares.rest > 0);
  return c.cta.shared + c.cta.a.received + c.thread % 128 * 16 +
         ((slot * Tile::kWarpgroups + c.warpgroup) * columns - first) * kColumnBytes<Tile>;
}

// Give each of the other parts its columns of this one's sums.
template <class Tile>
__device__ void send(Consumer<Tile>& c, const Work& work) {
  const auto& cta = c.cta;
  for (int i = 1; i < work.parts; ++i) {
    const int other = work.part + i < work.parts ? work.part + i : work.part + i - work.parts;
    const int first = cta.a.column_shares.begin(other);
    const int end = cta.a.column_shares.begin(other + 1);
    const int rank = (cta.rank & (work.tiles - 1)) + work.tiles * other;
    const uint32_t barrier = ptx::mapa(cta.reduced(), rank);
    const uint32_t to = ptx::mapa(cta.shared, rank) - cta.shared + received(c, work.part, other, first);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      if (j < first || j >= end) continue;
#pragma unroll
      for (int b = 0; b < Tile::kBlocks; ++b)
        ptx::st_async_v4(to + j * kColumnBytes<Tile> + b * 2048, c.at(b, 4 * j), c.at(b, 4 * j + 1), c.at(b, 4 * j + 2),
                         c.at(b, 4 * j + 3), barrier);
    }
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
  while (!ptx::mbarrier_try_wait_parity_cluster(cta.reduced(), 0)) {
  }
  for (int other = 0; other < work.parts; ++other) {
    if (other == work.part) continue;
    const uint32_t from = received(c, other, work.part, first);
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
