// Which candidate to take where nothing was measured: the one that a small model of the time expects to be the fastest.
//
// A candidate of tiles rows x tokens, K split into `split` parts, makes ceil(N / rows) ceil(M / tokens) split CTAs, in
// clusters, which run in waves over the multiprocessors. A CTA steps through its K, 128 at a time; a step takes as long
// as the products or the bytes to fetch of the CTAs that share its multiprocessor, whichever is more. So
//
//   t = fixed + waves (steps max(flop / rate, bytes / bandwidth) + tile + log2(split) reduce),
//
// and no less than the time in which the weights arrive from memory. The constants are fitted to times measured on an
// H100 by plugins/bench/fit.py, which also says how good the choices are; those of ampere and reference are estimates.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "candidate.h"
#include "esparse/es24.h"

namespace {

using esparse::ceil_div;

// Of the kernels whose names contain `part`, of several rows the last: nanoseconds; operations and bytes per nanosecond
// and multiprocessor.
struct Model {
  const char* part;
  double fixed, rate, bandwidth, tile, reduce;
};

constexpr Model kModels[] = {
    {"decode_", 832, 1250, 26.7, 593, 7.4},
    {"wgmma_", 31.0, 7408, 75.6, 2792, 718},
    {"cutlass_", 126, 7848, 73.9, 1571, 0},
    {"_pingpong_", 1509, 6431, 79.6, 129, 0},
    {"_streamk_", 1189, 5906, 131, 2472, 0},
    {"ampere_", 4000, 2500, 40, 1500, 0},
    {"reference", 4000, 50, 1, 0, 0},
};
constexpr double kMemory = 22.5;  // bytes per nanosecond and multiprocessor from memory, all of them at once

// Of how many multiprocessors of an H100 clusters of 1, 2, .. 8 CTAs can take one each: they do not cross its groups.
constexpr int kFilled[] = {132, 132, 117, 120, 110, 102, 105, 120};

// What a candidate's name says about its tiles.
struct Tile {
  const Model* model = nullptr;
  int rows = 128, tokens = 1, split = 1, per_sm = 1;
  int share_x = 1, share_w = 1;  // CTAs that fetch a tile of x, of W together
  bool stream_k = false;  // CTAs share out the steps evenly: waves need not be whole
  bool rows_first = false;  // CUTLASS's order of tiles that is less often the faster one
  bool divides_rest = false;  // a cluster splits the K of each tile that whole waves leave over
  // Absent tokens count as present ones, which the copy engine fills with zeros. The wgmma kernels that do not share x
  // spare it that where all tokens are in one tile; to count it makes the choices no better.
  bool fills = true;

  int cluster() const { return split * share_x * share_w; }  // CTAs that run together
};

// The number behind `key` in a name, such as 2 behind "_s" in "wgmma_n64m64_s2_o2"; 1 where there is none.
int number_after(const std::string& name, const std::string& key) {
  int number = 1;
  for (size_t at = name.find(key); at != std::string::npos; at = name.find(key, at + 1))
    if (std::sscanf(name.c_str() + at + key.size(), "%d", &number) == 1) break;
  return number;
}

Tile parse(const std::string& name) {
  Tile tile;
  for (const Model& model : kModels)
    if (name.find(model.part) != std::string::npos) tile.model = &model;
  if (name.rfind("decode_", 0) == 0) {
    tile.rows = 16 * number_after(name, "_r");
    tile.tokens = 16;
    tile.fills = false;
  } else if (std::sscanf(name.c_str(), "%*[a-z]_n%dm%d", &tile.rows, &tile.tokens) != 2) {
    std::sscanf(name.c_str(), "%*[a-z]_%dx%d", &tile.rows, &tile.tokens);
  }
  tile.split = number_after(name, "_s");
  tile.per_sm = number_after(name, "_o");
  if (name.rfind("wgmma_", 0) == 0) {
    tile.share_x = number_after(name, "_x");
    tile.share_w = number_after(name, "_w");
    tile.divides_rest = tile.cluster() > 1 && tile.split == 1 && name.find("_pingpong") == std::string::npos;
  } else if (name.rfind("cutlass_", 0) == 0) {
    const int cluster = number_after(name, "_c");  // two digits: along the rows, along the tokens
    tile.share_x = cluster / 10;
    tile.share_w = cluster % 10;
  }
  tile.stream_k = name.find("_streamk_") != std::string::npos;
  tile.rows_first = name.rfind("cutlass_", 0) == 0 && name.back() == 'n';
  return tile;
}

const std::vector<Tile>& tiles() {
  static const std::vector<Tile> all = [] {
    std::vector<Tile> parsed;
    for (int32_t i = 0; i < esparse_candidate_count(); ++i) parsed.push_back(parse(esparse_candidate_name(i)));
    return parsed;
  }();
  return all;
}

// How many times the clusters fill the GPU.
double waves(const Tile& tile, double clusters, double steps, const esparse_gpu& gpu) {
  const int filled = gpu.multiprocessors * kFilled[tile.cluster() - 1] / kFilled[0];
  const double room = std::max(1, filled * tile.per_sm / tile.cluster());
  if (tile.stream_k) return std::max(1., clusters / room);
  const double whole = std::floor(clusters / room), rest = clusters - whole * room;
  const bool divided = tile.divides_rest && whole > 0 && rest * tile.cluster() <= room && steps >= 2 * tile.cluster();
  return whole + (rest > 0 ? divided ? 1. / tile.cluster() : 1. : 0.);
}

double expected_ns(const esparse_gemm& p, const esparse_gpu& gpu, const Tile& tile) {
  if (!tile.model) return std::numeric_limits<double>::max();
  const Model& model = *tile.model;
  const auto clusters = static_cast<double>(ceil_div(p.n, tile.rows * tile.share_x) *
                                            ceil_div(p.m, tile.tokens * tile.share_w));
  const double ctas = clusters * tile.cluster();
  const double sharing = std::min<double>(tile.per_sm, std::ceil(ctas / gpu.multiprocessors));  // CTAs of one SM
  const double steps = static_cast<double>(ceil_div(ceil_div(p.k, esparse::kTileK), tile.split));
  const double flop = 2. * esparse::kTileK * tile.rows * tile.tokens;
  const double tokens = tile.fills ? tile.tokens : std::min<double>(tile.tokens, p.m);
  const double bytes = esparse::kTileK * (9. / 8 * tile.rows / tile.share_w + 2. * tokens / tile.share_x);
  const double step = std::max(flop / model.rate, bytes / model.bandwidth) * sharing;
  const double wave = steps * step + model.tile + std::log2(tile.split) * model.reduce;
  const double work = waves(tile, clusters, steps, gpu) * wave;
  const double weights = 9. / 8 * static_cast<double>(p.n * p.k) / (kMemory * gpu.multiprocessors);
  return (model.fixed + std::max(work, weights + model.tile)) * (tile.rows_first ? 1.001 : 1);
}

}  // namespace

int32_t esparse_default_candidate(const esparse_gemm* problem, const esparse_gpu* gpu) {
  int32_t best = -1;
  double least = 0;
  for (int32_t i = 0; i < esparse_candidate_count(); ++i) {
    if (esparse_supports(problem, gpu, i, nullptr) != ESPARSE_SUCCESS) continue;
    const double expected = expected_ns(*problem, *gpu, tiles()[i]);
    if (best < 0 || expected < least) best = i, least = expected;
  }
  return best;
}
