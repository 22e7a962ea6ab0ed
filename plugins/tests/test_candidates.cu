// Every candidate of the library on every shape that it supports: integers bitwise exact, random data, also through an
// activation, within a relative error, guard bands intact. A problem and its exact result are made once and shared by
// all candidates.
//
//   test_candidates [--quick | --tiny] [--filter SUBSTRING] [--stress REPLAYS]
//
// --stress replays a CUDA graph of each candidate and asks that every replay gives the same bits. --tiny is what
// compute-sanitizer, which makes kernels some hundred times slower, gets through: see sanitize.sh.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "problem.cuh"

namespace {

using namespace esparse_test;

struct Options {
  bool quick = false, tiny = false;
  std::string filter;
  int stress = 0;
};

struct Shape {
  int64_t n, k;
};

// Around every tile size of every kernel, absent rows and channels included.
std::vector<Shape> small_shapes(bool quick, bool tiny) {
  if (tiny) return {{136, 416}, {528, 1056}};
  std::vector<int64_t> rows{8, 24, 48, 64, 72, 128, 136, 256, 272, 520};
  std::vector<int64_t> channels{32, 96, 128, 160, 256, 416, 1024, 1056};
  if (quick) rows = {8, 48, 136, 528}, channels = {32, 416, 1024};
  std::vector<Shape> shapes;
  for (const int64_t n : rows)
    for (const int64_t k : channels) shapes.push_back({n, k});
  return shapes;
}

std::vector<int64_t> small_batches(bool quick, bool tiny) {
  if (tiny) return {3, 16, 40};
  if (quick) return {1, 3, 8, 13, 16, 17, 64, 129};
  return {1,  2,  3,  4,  5,  6,  7,  8,  9,   10,  11,  12,  13,  14,  15,  16,
          17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 1000};
}

struct Large {
  Shape shape;
  std::vector<int64_t> batches;
};

// The last two leave a few tiles over when every cluster of 132 multiprocessors has done as many as the others, so that
// the wgmma kernels split the K of these: those with tiles of 64 tokens, then those with larger ones.
std::vector<Large> large_shapes(bool quick) {
  if (quick) return {{{4096, 4096}, {1, 16, 256}}, {{4240, 1056}, {200}}, {{528, 1056}, {8000, 9000}}};
  return {{{4096, 4096}, {1, 2, 4, 8, 16, 32, 64, 256, 1000, 4096}},
          {{4864, 896}, {1, 7, 16, 48, 300}},
          {{896, 4864}, {1, 7, 16, 48, 300}},
          {{4096, 14336}, {1, 5, 8, 16, 64, 512}},
          {{28672, 4096}, {1, 8, 16, 64, 512}},
          {{8192, 28672}, {1, 4, 11, 16, 128}},
          {{128256, 4096}, {1, 16, 64}},
          {{4240, 1056}, {200}},
          {{528, 1056}, {8000, 9000}}};
}

class Sweep {
 public:
  Sweep(const Options& options, cudaStream_t stream) : options_(options), stream_(stream), outcomes_(kSlots, stream) {
    esparse_message message{};
    REQUIRE(esparse_current_gpu(&gpu_, &message) == ESPARSE_SUCCESS);
    for (int32_t i = 0; i < esparse_candidate_count(); ++i)
      if (std::strstr(esparse_candidate_name(i), options.filter.c_str())) candidates_.push_back(i);
    if (candidates_.empty()) {
      std::fprintf(stderr, "no candidate's name contains %s\n", options.filter.c_str());
      std::exit(2);
    }
    runs_.resize(esparse_candidate_count());
    clear();
  }

  // All candidates on one problem. Programmatic launch goes with every second problem.
  void check(const Case& c) {
    const auto able = able_candidates(c);
    if (able.empty()) return;
    const Problem problem(c, workspace_bytes(c, able), stream_);
    const bool programmatic = ++problems_ % 2;
    for (const int32_t candidate : able) {
      if (pending_.size() == kSlots) settle();
      pending_.push_back({c, candidate, programmatic, c.numbers == Numbers::integers && !c.activation});
      run(problem, candidate, programmatic);
      problem.after(bytes_of(problem, candidate), slot());
    }
  }

  // All candidates on one problem, each `replays` times as a graph; every output must equal the first one's bits.
  void stress(const Case& c, int replays) {
    const auto able = able_candidates(c);
    if (able.empty()) return;
    const Problem problem(c, workspace_bytes(c, able), stream_);
    for (const int32_t candidate : able) {
      if (pending_.size() == kSlots) settle();
      pending_.push_back({c, candidate, true, true});
      run(problem, candidate, true);
      problem.expect_present_output();
      cudaGraph_t graph;
      cudaGraphExec_t executable;
      REQUIRE_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      run(problem, candidate, true);
      problem.after(bytes_of(problem, candidate), slot());
      REQUIRE_CUDA(cudaStreamEndCapture(stream_, &graph));
      REQUIRE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
      for (int i = 0; i < replays; ++i) REQUIRE_CUDA(cudaGraphLaunch(executable, stream_));
      REQUIRE_CUDA(cudaStreamSynchronize(stream_));
      REQUIRE_CUDA(cudaGraphExecDestroy(executable));
      REQUIRE_CUDA(cudaGraphDestroy(graph));
    }
  }

  // Wait for the checks under way and judge them.
  void settle() {
    std::vector<Outcome> outcomes(pending_.size());
    REQUIRE_CUDA(cudaMemcpyAsync(outcomes.data(), outcomes_.get(), outcomes.size() * sizeof(Outcome),
                                 cudaMemcpyDeviceToHost, stream_));
    const cudaError_t error = cudaStreamSynchronize(stream_);
    if (error) {
      std::printf("%s, at or before %s\n", cudaGetErrorString(error), describe(pending_.back()).c_str());
      std::exit(1);
    }
    for (size_t i = 0; i < outcomes.size(); ++i) judge(pending_[i], outcomes[i]);
    clear();
  }

  // Print what was done; the process's exit status.
  int summary() const {
    int used = 0;
    long checks = 0;
    for (const long runs : runs_) used += runs > 0, checks += runs;
    std::printf("candidates: %ld checks of %d candidates (of %zu chosen), %ld failed\n", checks, used,
                candidates_.size(), failures_);
    return failures_ > 0;
  }

 private:
  static constexpr size_t kSlots = 4096;
  static constexpr long kShownFailures = 20;

  struct Check {
    Case c;
    int32_t candidate;
    bool programmatic;
    bool bitwise;
  };

  // The CUDA-core kernel takes seconds where the others take a millisecond.
  static bool worth_running(const Case& c, int32_t candidate) {
    return std::strcmp(esparse_candidate_name(candidate), "reference") != 0 || c.m * c.n * c.k < int64_t{1} << 32;
  }

  // The problem without data: pointers are only compared with null.
  static esparse_gemm outline(const Case& c) {
    static const int32_t something = 0;
    esparse_gemm p{};
    p.m = c.m, p.n = c.n, p.k = c.k, p.dtype = c.dtype, p.activation = c.activation;
    if (c.bias) p.bias = &something;
    if (c.permutation) p.permutation = &something;
    return p;
  }

  std::vector<int32_t> able_candidates(const Case& c) const {
    const esparse_gemm problem = outline(c);
    std::vector<int32_t> able;
    for (const int32_t candidate : candidates_)
      if (worth_running(c, candidate) && esparse_supports(&problem, &gpu_, candidate, nullptr) == ESPARSE_SUCCESS)
        able.push_back(candidate);
    return able;
  }

  static size_t workspace_bytes(const Case& c, const std::vector<int32_t>& candidates) {
    const esparse_gemm problem = outline(c);
    size_t most = 0;
    for (const int32_t candidate : candidates) most = std::max(most, esparse_workspace_bytes(&problem, candidate));
    return most;
  }

  static size_t bytes_of(const Problem& problem, int32_t candidate) {
    const esparse_gemm gemm = problem.gemm();
    return esparse_workspace_bytes(&gemm, candidate);
  }

  Outcome* slot() const { return outcomes_.get() + pending_.size() - 1; }

  void run(const Problem& problem, int32_t candidate, bool programmatic) {
    const esparse_gemm gemm = problem.gemm();
    const size_t bytes = bytes_of(problem, candidate);
    const esparse_launch launch{stream_, problem.workspace(), bytes, programmatic};
    esparse_message message{};
    problem.before(bytes, programmatic);
    if (esparse_gemm_run(&gemm, candidate, &launch, &message) != ESPARSE_SUCCESS) fail(pending_.back(), message.text);
  }

  void judge(const Check& check, const Outcome& outcome) {
    ++runs_[check.candidate];
    const double error = std::sqrt(outcome.difference / std::max(outcome.norm, 1e-30));
    const double limit = check.c.dtype == ESPARSE_FP16 ? 2e-3 : 1e-2;
    char text[128];
    if (outcome.overwritten) {
      std::snprintf(text, sizeof text, "%llu elements of guard bands overwritten", outcome.overwritten);
    } else if (check.bitwise && outcome.wrong) {
      std::snprintf(text, sizeof text, "%llu of %lld elements are not bitwise right, relative error %.2g",
                    outcome.wrong, static_cast<long long>(check.c.m * check.c.columns()), error);
    } else if (!(error < limit)) {
      std::snprintf(text, sizeof text, "relative error %.2g, the limit is %.2g", error, limit);
    } else {
      return;
    }
    fail(check, text);
  }

  static std::string describe(const Check& check) {
    const auto& [c, candidate, programmatic, bitwise] = check;
    char text[256];
    static const char* const activations[] = {"", " swiglu", " geglu"};
    std::snprintf(text, sizeof text, "%s m=%lld n=%lld k=%lld %s %s%s%s%s%s", esparse_candidate_name(candidate),
                  static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k),
                  c.dtype == ESPARSE_FP16 ? "fp16" : "bf16", c.numbers == Numbers::integers ? "integers" : "normal",
                  activations[c.activation], c.bias ? " bias" : "", c.permutation ? " permutation" : "",
                  programmatic ? " programmatic" : "");
    return text;
  }

  void fail(const Check& check, const char* what) {
    if (++failures_ <= kShownFailures) std::printf("FAILED %s: %s\n", describe(check).c_str(), what);
  }

  void clear() {
    pending_.clear();
    REQUIRE_CUDA(cudaMemsetAsync(outcomes_.get(), 0, kSlots * sizeof(Outcome), stream_));
  }

  Options options_;
  cudaStream_t stream_;
  esparse_gpu gpu_{};
  Buffer<Outcome> outcomes_;
  std::vector<int32_t> candidates_;
  std::vector<Check> pending_;
  std::vector<long> runs_;
  long problems_ = 0, failures_ = 0;
};

// Types, kinds of numbers, bias, permutation and activation in turn, so that every candidate meets every combination.
// Integers have none: what comes of them does not fit fp16.
void sweep(Sweep& sweep, Shape shape, const std::vector<int64_t>& batches) {
  static uint32_t turn = 0;
  const auto check = [&](int64_t m, Numbers numbers, bool activated) {
    const uint32_t mix = hash(turn++, 0);
    const auto dtype = mix & 1 ? ESPARSE_BF16 : ESPARSE_FP16;
    const auto activation = !activated ? ESPARSE_NO_ACTIVATION : mix & 8 ? ESPARSE_GEGLU : ESPARSE_SWIGLU;
    sweep.check({m, shape.n, shape.k, dtype, numbers, (mix & 2) != 0, (mix & 4) != 0, activation});
  };
  for (const int64_t m : batches) {
    check(m, Numbers::integers, false);
    check(m, Numbers::normal, false);
    if (shape.n % 16 == 0) check(m, Numbers::normal, true);
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--tiny") {
      options.tiny = true;
    } else if (argument == "--filter" && i + 1 < argc) {
      options.filter = argv[++i];
    } else if (argument == "--stress" && i + 1 < argc) {
      options.stress = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: %s [--quick | --tiny] [--filter SUBSTRING] [--stress REPLAYS]\n", argv[0]);
      std::exit(2);
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("candidates: skipped, no GPU");
    return 77;
  }
  cudaMemPool_t pool;
  uint64_t keep = UINT64_MAX;  // freed memory stays in the pool: no wait for the device between problems
  REQUIRE_CUDA(cudaDeviceGetDefaultMemPool(&pool, 0));
  REQUIRE_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  cudaStream_t stream;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  Sweep all(options, stream);
  if (options.stress) {
    for (const int64_t m : {1, 16, 64, 300})
      all.stress({m, 520, 4096, ESPARSE_FP16, Numbers::normal, true, false}, options.stress);
    // Several tiles for each CTA, some of them left over.
    all.stress({8000, 528, 1056, ESPARSE_FP16, Numbers::normal, true, false}, options.stress / 10);
  } else {
    for (const Shape shape : small_shapes(options.quick, options.tiny))
      sweep(all, shape, small_batches(options.quick, options.tiny));
    if (!options.tiny)
      for (const Large& large : large_shapes(options.quick)) sweep(all, large.shape, large.batches);
  }
  all.settle();
  return all.summary();
}
