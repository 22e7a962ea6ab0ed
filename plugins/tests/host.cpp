// The TensorRT plugin without a GPU: creation, shapes, formats, errors, storing in an engine, choices and tactics.
//
//   plugin_host LIBRARY FAKE_LIBNVINFER
#include "host.h"

#include <set>

#include "../tensorrt/choices.h"

namespace {

using namespace host;

constexpr Sizes kSizes{256, 128};
constexpr auto kHalf = DataType::kHALF;

Tensors tensors(std::vector<int64_t> lead, DataType type = kHalf) {
  return {kSizes, false, false, type, std::move(lead)};
}

int32_t registered(void* tensorrt) {
  const auto registry = reinterpret_cast<decltype(&getPluginRegistry)>(dlsym(tensorrt, "getPluginRegistry"));
  int32_t count = 0;
  registry()->getAllCreators(&count);
  return count;
}

// Loading the library is enough to register its creators; loadLibrary, which registers what getCreators gives, is not
// in the way of that.
void test_registration(const char* library, const char* fake_tensorrt) {
  void* tensorrt = dlopen(fake_tensorrt, RTLD_NOW);
  REQUIRE(tensorrt != nullptr && registered(tensorrt) == 0);
  REQUIRE(dlopen(library, RTLD_NOW) != nullptr && registered(tensorrt) == 4);
  REQUIRE(Library(library).creators().size() == 4 && registered(tensorrt) == 0);
}

void test_library(const Library& library) {
  const auto& about = library.about();
  REQUIRE(about.tensorrt_major == NV_TENSORRT_MAJOR);
  REQUIRE(about.layout == std::string("es24-v1"));
  REQUIRE(about.version == std::string(esparse_version()) && about.kernel_set == std::string(esparse_kernel_set()));
  REQUIRE(library.creators().size() == 4);
  for (const bool bias : {false, true})
    for (const bool permutation : {false, true}) {
      auto* creator = library.creators().at(Library::operator_name(bias, permutation));
      REQUIRE(creator->getPluginVersion() == std::string("1"));
      REQUIRE(creator->getPluginNamespace() == std::string("esparse"));
      const auto layer = library.create(creator->getPluginName(), Fields::of(kSizes, ""));
      REQUIRE(layer.core().getPluginName() == std::string(creator->getPluginName()));
      REQUIRE(layer.build().getNbOutputs() == 1);
    }
}

void refuse(const Library& library, Fields fields, const char* words) {
  library.logger.errors.clear();
  REQUIRE(!library.create("SparseGemm", std::move(fields)));
  REQUIRE(library.logger.errors.find(words) != std::string::npos);
  REQUIRE(library.logger.errors.find("SparseGemm layer 7") != std::string::npos);
}

void test_attributes(const Library& library) {
  const auto with = [](const char* name, auto value) {
    Fields fields = Fields::of(kSizes, "");
    fields.set(name, value);
    return fields;
  };
  const auto without = [](const char* name) {
    Fields fields = Fields::of(kSizes, "");
    fields.drop(name);
    return fields;
  };
  refuse(library, without("layout"), "attribute layout is missing");
  refuse(library, without("in_features"), "attribute in_features is missing");
  refuse(library, with("layout", "es24-v2"), "layout is 'es24-v2', this library knows 'es24-v1'");
  refuse(library, with("pattern", "1:4"), "pattern is '1:4'");
  refuse(library, with("pattern", int64_t{24}), "pattern is not a string");
  refuse(library, with("in_features", "128"), "in_features is not an integer");
  refuse(library, with("in_features", int64_t{120}), "no layer of 256 out_features");
  refuse(library, with("out_features", int64_t{-8}), "no layer of -8 out_features");
  refuse(library, with("choices", "reference"), "choices: 'reference' is not bound=name");
  refuse(library, with("choices", "x=reference"), "does not start with a number of tokens");
  refuse(library, with("choices", "0=reference"), "does not start with a number of tokens");
  refuse(library, with("choices", "8=reference,8=reference"), "not in ascending order");
  REQUIRE(library.create("SparseGemm", without("choices")));
}

void test_shapes(const Library& library) {
  const auto layer = library.create("SparseGemm", Fields::of(kSizes, ""));
  for (const std::vector<int64_t>& lead : {std::vector<int64_t>{}, {5}, {2, 3}, {2, 3, 4}}) {
    Expressions expressions;
    std::deque<Number> numbers;
    DimsExprs in[3] = {}, out{};
    const Tensors t = tensors(lead);
    for (int i = 0; i < 3; ++i) {
      in[i].nbDims = t.in[i].dims.nbDims;
      for (int d = 0; d < in[i].nbDims; ++d) in[i].d[d] = &numbers.emplace_back(t.in[i].dims.d[d]);
    }
    REQUIRE(layer.build().getOutputShapes(in, 3, nullptr, 0, &out, 1, expressions) == 0);
    REQUIRE(out.nbDims == t.out[0].dims.nbDims);
    for (int d = 0; d < out.nbDims; ++d) REQUIRE(out.d[d]->getConstantValue() == t.out[0].dims.d[d]);
    REQUIRE(layer.configure({t, t, t}) == 0);
    REQUIRE(layer.change_shape(t) == 0);
  }
  const DataType in[] = {DataType::kBF16, DataType::kBF16, DataType::kINT32};
  DataType out{};
  REQUIRE(layer.build().getOutputDataTypes(&out, 1, in, 3) == 0 && out == DataType::kBF16);
}

void test_formats(const Library& library) {
  const auto layer = library.create("SparseGemmBiasPermute", Fields::of(kSizes, ""));
  const auto count = [&](const Tensors& t) {  // of positions that the plugin takes, up to the first that it does not
    const Ranges r(t, t, t);
    auto all = r.in;
    all.push_back(r.out[0]);
    int accepted = 0;
    while (accepted < 6 && layer.build().supportsFormatCombination(accepted, all.data(), 5, 1)) ++accepted;
    return accepted;
  };
  const auto make = [](DataType type) { return Tensors(kSizes, true, true, type, {1, 4}); };
  REQUIRE(count(make(kHalf)) == 6 && count(make(DataType::kBF16)) == 6);
  REQUIRE(count(make(DataType::kFLOAT)) == 0 && count(make(DataType::kINT8)) == 0);
  for (int position = 0; position < 5; ++position) {
    Tensors t = make(kHalf);
    t.in[position].type = DataType::kFLOAT;
    REQUIRE(count(t) == position);
    t = make(kHalf);
    t.in[position].format = TensorFormat::kCHW2;
    REQUIRE(count(t) == position);
  }
}

// A fault in the tensors stops both the build and the run, with its reason.
void stop(const Library& library, const Tensors& t, const char* words) {
  const auto layer = library.create("SparseGemm", Fields::of(kSizes, ""));
  for (const bool build : {true, false}) {
    library.logger.errors.clear();
    REQUIRE((build ? layer.configure({t, t, t}) : layer.change_shape(t)) != 0);
    REQUIRE(library.logger.errors.find(words) != std::string::npos);
  }
}

void test_faults(const Library& library) {
  auto t = tensors({2, 3});
  t.in[0].dims.d[2] = 256, stop(library, t, "x is [2, 3, 256], its last dimension must be in_features, 128");
  t = tensors({2, 3}), t.in[1].dims.d[0] = 128, stop(library, t, "values are [128, 64]");
  t = tensors({2, 3}), t.in[2].dims.d[0] += 1, stop(library, t, "metadata has 1280 words, must have 1024");
  t = tensors({2, 3}, DataType::kFLOAT), stop(library, t, "needs fp16 or bf16");
  t = tensors({2, 3}), t.in[1].type = DataType::kBF16, stop(library, t, "differ in type");
  t = tensors({2, 3}), t.in[2].type = DataType::kINT64, stop(library, t, "must be int32");
  t = tensors({2, 3}), t.in.pop_back(), stop(library, t, "has 2 inputs and 1 outputs, needs 3 and 1");
  t = tensors({2, 3}), t.out[0].dims.d[0] = 1, stop(library, t, "y is [1, 3, 256], must be [2, 3, 256]");
  stop(library, tensors({2, 32769}), "65538 tokens, at most 65536");
  const Tensors best = tensors({1, 8}), high = tensors({8, 8193});
  REQUIRE(library.create("SparseGemm", Fields::of(kSizes, "")).configure({best, best, high}) != 0);
}

void test_storing(const Library& library) {
  const auto layer = library.create("SparseGemmBias", Fields::of(kSizes, "1=reference,64=reference"));
  const auto restored = library.restore(layer);
  REQUIRE(restored && restored.core().getPluginName() == std::string("SparseGemmBias"));
  Fields fields(*layer.runtime().getFieldsToSerialize());
  REQUIRE(Fields(*restored.runtime().getFieldsToSerialize()) == fields);
  REQUIRE(Fields(*restored.attach().runtime().getFieldsToSerialize()) == fields);
  REQUIRE(Fields(*Layer(restored->clone()).runtime().getFieldsToSerialize()) == fields);
  REQUIRE(layer.build().getTimingCacheID() == std::string(restored.build().getTimingCacheID()));
  const auto other = library.create("SparseGemmBias", Fields::of(kSizes, ""));
  REQUIRE(layer.build().getTimingCacheID() != std::string(other.build().getTimingCacheID()));

  fields.set("kernel_set", "000000000000");  // an engine of another version of the library
  library.logger.warnings.clear();
  REQUIRE(library.create("SparseGemmBias", fields, TensorRTPhase::kRUNTIME));
  REQUIRE(library.logger.warnings.find("was built with the kernels 000000000000") != std::string::npos);
}

void test_choices(const Library& library) {
  using namespace esparse;
  REQUIRE(bucket_of(1) == 0 && bucket_of(2) == 1 && bucket_of(3) == 2 && bucket_of(16) == 4 && bucket_of(17) == 5);
  REQUIRE(kBuckets[bucket_of(4097)] == 8192 && kBuckets[bucket_of(65536)] == 8192);

  const int32_t reference = esparse_find_candidate("reference");
  Choices choices;
  REQUIRE(parse_choices("4=reference,64=no_such_kernel", choices).empty());
  REQUIRE(choices.unknown == std::vector<std::string>{"no_such_kernel"});
  REQUIRE(choices.rows.size() == 2 && choices.rows[0].candidate == reference);
  REQUIRE(choices.rows[1].candidate == kHeuristic);

  constexpr esparse_gpu kH100{90, 132};
  esparse_gemm problem{};
  problem.n = 4096, problem.k = 4096;
  for (problem.m = 1; problem.m <= 65536; problem.m *= 2) {
    const int32_t heuristic = esparse_default_candidate(&problem, &kH100);
    REQUIRE(select(problem, kH100, choices, {}, false) == (problem.m <= 4 ? reference : heuristic));
    REQUIRE(select(problem, kH100, {}, {reference, bucket_of(8)}, false) == (problem.m == 8 ? reference : heuristic));
    // The scratch memory of another version of the library holds what the reference kernel needs, no more.
    const int32_t safe = select(problem, kH100, {}, {}, true);
    REQUIRE(esparse_workspace_bytes(&problem, safe) <= esparse_workspace_bytes(&problem, reference));
    // What is planned for the largest number of tokens is enough for all smaller ones.
    for (int32_t i = 0; i < esparse_candidate_count(); ++i)
      if (esparse_supports(&problem, &kH100, i, nullptr) == ESPARSE_SUCCESS)
        REQUIRE(esparse_workspace_bytes(&problem, i) <= workspace_bound(problem));
  }

  REQUIRE(parse_choices("8192=reference", choices).empty());
  problem.m = 65536;
  REQUIRE(select(problem, kH100, choices, {}, false) == reference);

  std::set<int32_t> numbers;
  for (int bucket = 0; bucket < static_cast<int>(std::size(kBuckets)); ++bucket)
    for (int32_t i = 0; i < esparse_candidate_count(); ++i) {
      const int32_t number = tactic_of(i, bucket);
      const Tactic found = find_tactic(number);
      REQUIRE(number > 0 && found.candidate == i && found.bucket == bucket && numbers.insert(number).second);
    }
  REQUIRE(find_tactic(0).candidate == kHeuristic && find_tactic(12345).candidate == kHeuristic);

  library.logger.warnings.clear();
  const auto layer = library.create("SparseGemm", Fields::of(kSizes, "1=no_such_kernel"));
  REQUIRE(layer && library.logger.warnings.find("has no kernel 'no_such_kernel'") != std::string::npos);
  REQUIRE(layer.configure({tensors({1}), tensors({1}), tensors({1})}) == 0 && layer.build().getNbTactics() == 0);
  REQUIRE(layer.runtime().setTactic(12345) == 0);
  REQUIRE(library.logger.warnings.find("timed with a kernel that this library does not have") != std::string::npos);
}

}  // namespace

int main(int count, char** arguments) {
  REQUIRE(count == 3);
  test_registration(arguments[1], arguments[2]);
  const Library library(arguments[1]);
  test_library(library);
  test_attributes(library);
  test_shapes(library);
  test_formats(library);
  test_faults(library);
  test_storing(library);
  test_choices(library);
  std::puts("plugin: passed");
}
