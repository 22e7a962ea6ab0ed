// The TensorRT plugin on a GPU, driven as TensorRT would: every variant, type and tactic against the exact result, in
// a CUDA graph, from two contexts on two streams at once; and the device memory of a packed layer.
//
//   plugin_host_gpu LIBRARY
#include "host.h"
#include "problem.cuh"

namespace {

using namespace host;
using esparse_test::Buffer;
using esparse_test::Case;
using esparse_test::Numbers;
using esparse_test::Outcome;
using esparse_test::Problem;

Tensors tensors(const Case& c, int64_t m) {  // x [1, m, K] or [2, m / 2, K]: the leading dimensions multiply
  const DataType type = c.dtype == ESPARSE_FP16 ? DataType::kHALF : DataType::kBF16;
  const auto lead = m % 2 ? std::vector<int64_t>{1, m} : std::vector<int64_t>{2, m / 2};
  return {{c.n, c.k}, c.bias, c.permutation, type, lead};
}

// What building an engine leaves of a layer.
struct Engine {
  Engine(const Library& library, const Case& c, const std::string& choices) : layer(nullptr) {
    const std::string name = Library::operator_name(c.bias, c.permutation);
    const Layer built = library.create(name, Fields::of({c.n, c.k}, choices));
    const Ranges ranges(tensors(c, 1), tensors(c, c.m), tensors(c, c.m));
    REQUIRE(built.configure(ranges) == 0);
    workspace = built.workspace(ranges);
    tactics.resize(built.build().getNbTactics());
    REQUIRE(built.build().getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) == 0);
    REQUIRE(tactics.empty() == !choices.empty());
    tactics.push_back(0);
    layer = library.restore(built);
  }

  Layer layer;
  size_t workspace;
  std::vector<int32_t> tactics;
};

// An execution context of the engine, and the tensors that are bound to it.
class Context {
 public:
  Context(const Engine& engine, int32_t tactic, const Case& c, const Problem& problem, cudaStream_t stream)
      : layer_(engine.layer.attach()),
        tensors_(tensors(c, c.m)),
        problem_(problem),
        outcome_(1, stream),
        workspace_(engine.workspace),
        stream_(stream) {
    REQUIRE_CUDA(cudaMemsetAsync(outcome_.get(), 0, sizeof(Outcome), stream));
    const esparse_gemm gemm = problem_.gemm();
    inputs_ = {gemm.x, gemm.values, gemm.metadata};
    if (c.bias) inputs_.push_back(gemm.bias);
    if (c.permutation) inputs_.push_back(gemm.permutation);
    output_ = gemm.y;
    REQUIRE(layer_.runtime().setTactic(tactic) == 0);
    REQUIRE(layer_.change_shape(tensors_) == 0);
  }

  // Enqueue the arrival of x, the layer, and the comparison with the exact result.
  void enqueue() {
    problem_.before(workspace_, true);
    REQUIRE(layer_.runtime().enqueue(tensors_.in.data(), tensors_.out.data(), inputs_.data(), &output_,
                                     problem_.workspace(), stream_) == 0);
    problem_.after(workspace_, outcome_.get());
  }

  // The outcome of all runs so far: relative L2 distance, nothing beyond its bounds.
  double check(Numbers numbers) {
    Outcome outcome;
    REQUIRE_CUDA(cudaMemcpyAsync(&outcome, outcome_.get(), sizeof outcome, cudaMemcpyDeviceToHost, stream_));
    REQUIRE_CUDA(cudaStreamSynchronize(stream_));
    REQUIRE(outcome.overwritten == 0);
    REQUIRE(numbers == Numbers::normal || outcome.wrong == 0);
    return std::sqrt(outcome.difference / outcome.norm);
  }

 private:
  Layer layer_;
  Tensors tensors_;
  const Problem& problem_;
  Buffer<Outcome> outcome_;
  size_t workspace_;
  cudaStream_t stream_;
  std::vector<const void*> inputs_;
  void* output_;
};

void test_tactics(const Library& library, cudaStream_t stream) {
  double worst[2] = {};
  int runs = 0;
  const auto test = [&](const Case& c) {
    const Engine engine(library, c, "");
    const Problem problem(c, engine.workspace, stream);
    for (const int32_t tactic : engine.tactics) {
      Context context(engine, tactic, c, problem, stream);
      context.enqueue();
      const double error = context.check(c.numbers);
      REQUIRE(error < (c.dtype == ESPARSE_FP16 ? 2e-3 : 1e-2));
      worst[c.dtype] = std::max(worst[c.dtype], error);
      ++runs;
    }
  };
  for (const auto dtype : {ESPARSE_FP16, ESPARSE_BF16})
    for (const int variant : {0, 1, 2, 3}) {
      const bool bias = variant & 1, permutation = variant & 2;
      for (const Sizes s : {Sizes{256, 128}, Sizes{72, 416}, Sizes{1024, 1024}})
        for (const int64_t m : {1, 3, 8, 16, 17, 64, 200})
          test({m, s.n, s.k, dtype, Numbers::integers, bias, permutation});
      for (const int64_t m : {16, 256}) test({m, 4096, 4096, dtype, Numbers::normal, bias, permutation});
    }
  std::printf("plugin: %d runs of all tactics; worst relative L2 %.1e (fp16), %.1e (bf16)\n", runs, worst[0], worst[1]);
}

Case permuted(int64_t m) { return {m, 1024, 1024, ESPARSE_FP16, Numbers::integers, true, true}; }

// A choice by name, one that this library does not have, and none: each M falls into another of these.
void test_choices(const Library& library, cudaStream_t stream) {
  for (const int64_t m : {1, 2, 64, 65, 300}) {
    const Engine engine(library, permuted(m), "1=reference,64=no_such_kernel");
    const Problem problem(permuted(m), engine.workspace, stream);
    Context context(engine, 0, permuted(m), problem, stream);
    context.enqueue();
    context.check(Numbers::integers);
  }
}

void test_graph(const Library& library, cudaStream_t stream) {
  for (const int64_t m : {1, 16, 300}) {
    const Engine engine(library, permuted(m), "");
    const Problem problem(permuted(m), engine.workspace, stream);
    for (const int32_t tactic : engine.tactics) {
      Context context(engine, tactic, permuted(m), problem, stream);
      REQUIRE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      context.enqueue();
      cudaGraph_t graph;
      cudaGraphExec_t replayable;
      REQUIRE_CUDA(cudaStreamEndCapture(stream, &graph));
      REQUIRE_CUDA(cudaGraphInstantiate(&replayable, graph, 0));
      for (int i = 0; i < 20; ++i) REQUIRE_CUDA(cudaGraphLaunch(replayable, stream));
      context.check(Numbers::integers);
      REQUIRE_CUDA(cudaGraphExecDestroy(replayable));
      REQUIRE_CUDA(cudaGraphDestroy(graph));
    }
  }
  std::puts("plugin: exact in 20 replays of a CUDA graph of every tactic");
}

void test_two_contexts(const Library& library, cudaStream_t first, cudaStream_t second) {
  for (const int64_t m : {1, 16, 300}) {
    const Engine engine(library, permuted(m), "");
    const Problem here(permuted(m), engine.workspace, first), there(permuted(m), engine.workspace, second);
    for (const int32_t tactic : engine.tactics) {
      Context a(engine, tactic, permuted(m), here, first), b(engine, tactic, permuted(m), there, second);
      for (int i = 0; i < 20; ++i) a.enqueue(), b.enqueue();
      a.check(Numbers::integers), b.check(Numbers::integers);
    }
  }
  std::puts("plugin: exact from two contexts on two streams at once");
}

size_t free_memory() {
  size_t free = 0, total = 0;
  REQUIRE_CUDA(cudaDeviceSynchronize());
  REQUIRE_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

// What the weights of a layer take, measured, and that the plugin adds nothing to it.
void test_memory(const Library& library, cudaStream_t stream) {
  constexpr int64_t kN = 28672, kK = 8192;
  const Case c{16, kN, kK, ESPARSE_FP16, Numbers::normal, false, false};
  const size_t before = free_memory();
  void *values, *metadata, *dense;
  REQUIRE_CUDA(cudaMalloc(&values, kN * kK));
  REQUIRE_CUDA(cudaMalloc(&metadata, 4 * esparse_metadata_words(kN, kK)));
  const size_t packed = before - free_memory();
  REQUIRE_CUDA(cudaMalloc(&dense, 2 * kN * kK));
  const double ratio = static_cast<double>(packed) / static_cast<double>(before - free_memory() - packed);
  for (void* pointer : {values, metadata, dense}) REQUIRE_CUDA(cudaFree(pointer));

  const Engine engine(library, c, "");
  const Problem problem(c, engine.workspace, stream);
  Context(engine, 0, c, problem, stream).enqueue();  // loads the kernels
  const size_t loaded = free_memory();
  const Engine again(library, c, "");
  Context(again, 0, c, problem, stream).enqueue();
  REQUIRE(free_memory() == loaded);
  std::printf("plugin: %ldx%ld packed takes %.4f of dense device memory, the plugin adds none; scratch %.2f MiB\n",
              kN, kK, ratio, engine.workspace / 1048576.);
  REQUIRE(ratio <= 0.565);
}

}  // namespace

int main(int count, char** arguments) {
  REQUIRE(count == 2);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("plugin: skipped, no GPU");
    return 77;
  }
  const Library library(arguments[1]);
  cudaStream_t first, second;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
  test_memory(library, first);
  test_tactics(library, first);
  test_choices(library, first);
  test_graph(library, first);
  test_two_contexts(library, first, second);
  std::puts("plugin: passed on the GPU");
}
