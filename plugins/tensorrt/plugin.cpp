#include "plugin.h"

#include <algorithm>
#include <exception>
#include <new>
#include <sstream>

#include "log.h"

namespace esparse {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int64_t kMostTokens = 65536;  // of the C ABI

int64_t volume(const int64_t* sizes, int32_t count) {
  int64_t product = 1;
  for (int32_t i = 0; i < count; ++i) product *= sizes[i];
  return product;
}

// M: the product of the leading dimensions of x.
int64_t tokens(const Dims& x) { return volume(x.d, x.nbDims - 1); }

bool same(const Dims& dims, std::initializer_list<int64_t> sizes) {
  return dims.nbDims == static_cast<int32_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), dims.d);
}

std::string text(const Dims& dims) {
  std::ostringstream out;
  for (int32_t i = 0; i < dims.nbDims; ++i) out << (i ? ", " : "[") << dims.d[i];
  out << "]";
  return out.str();
}

bool is_half(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

// The tensors at the shapes that their profile is tuned for.
std::vector<PluginTensorDesc> at_optimum(const DynamicPluginTensorDesc* tensors, int32_t count) {
  std::vector<PluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) {
    descs.push_back(tensors[i].desc);
    descs.back().dims = tensors[i].opt;
  }
  return descs;
}

}  // namespace

SparseGemmPlugin::SparseGemmPlugin(Layer layer, Choices choices)
    : layer_(std::move(layer)), choices_(std::move(choices)) {
  cache_id_ = std::string(layer_.variant->name) + " " + std::to_string(layer_.n) + "x" + std::to_string(layer_.k) +
              " " + kLayout + " kernels " + esparse_kernel_set() + " choices " + layer_.choices;
}

// --- IPluginV3 -------------------------------------------------------------------------------------------------------

nvinfer1::IPluginCapability* SparseGemmPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* SparseGemmPlugin::clone() noexcept {
  try {
    return new SparseGemmPlugin(*this);
  } catch (const std::exception& error) {
    fail(error.what());
    return nullptr;
  }
}

// --- build -----------------------------------------------------------------------------------------------------------

int32_t SparseGemmPlugin::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                             int32_t) const noexcept {
  outputs[0] = inputs[0];
  return 0;
}

int32_t SparseGemmPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs, int32_t,
                                          nvinfer1::IExprBuilder& expressions) noexcept {
  if (input_count != layer_.variant->inputs() || inputs[0].nbDims < 1)
    return fail("needs " + std::to_string(layer_.variant->inputs()) + " inputs, the first of at least 1 dimension");
  outputs[0] = inputs[0];
  outputs[0].d[outputs[0].nbDims - 1] = expressions.constant(layer_.n);
  return 0;
}

bool SparseGemmPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                                 int32_t input_count, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const bool is_permutation = layer_.variant->permutation && position == layer_.variant->permutation_index();
  if (position == 2 || (is_permutation && position < input_count)) return tensor.type == DataType::kINT32;
  return position == 0 ? is_half(tensor.type) : tensor.type == tensors[0].desc.type;
}

int32_t SparseGemmPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                          const DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept try {
  tactics_.clear();
  const auto in = at_optimum(inputs, input_count), out = at_optimum(outputs, output_count);
  const std::string what = fault(in.data(), input_count, out.data(), output_count);
  if (!what.empty()) return fail(what);
  if (tokens(inputs[0].max) > kMostTokens)
    return fail("x has up to " + std::to_string(tokens(inputs[0].max)) + " tokens, at most " +
                std::to_string(kMostTokens) + " are possible");

  // Where the tuner has chosen, or nothing can be timed, there is only TensorRT's default tactic.
  esparse_gpu gpu;
  if (!choices_.rows.empty() || esparse_current_gpu(&gpu, nullptr) != ESPARSE_SUCCESS) return 0;
  const esparse_gemm best = problem(tokens(in[0].dims), in[0].type);
  const int32_t reference = esparse_find_candidate("reference");  // never the fastest: the heuristic's last resort
  for (int32_t candidate = 0; candidate < esparse_candidate_count(); ++candidate)
    if (candidate != reference && esparse_supports(&best, &gpu, candidate, nullptr) == ESPARSE_SUCCESS)
      tactics_.push_back(tactic_of(candidate, bucket_of(best.m)));
  return 0;
} catch (const std::exception& error) {
  return fail(error.what());
}

size_t SparseGemmPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                                          const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return workspace_bound(problem(tokens(inputs[0].max), inputs[0].desc.type));
}

int32_t SparseGemmPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  if (count != getNbTactics()) return fail("was asked for " + std::to_string(count) + " tactics");
  std::copy(tactics_.begin(), tactics_.end(), tactics);
  return 0;
}

// --- runtime ---------------------------------------------------------------------------------------------------------

int32_t SparseGemmPlugin::setTactic(int32_t tactic) noexcept {
  tactic_ = find_tactic(tactic);
  if (tactic != 0 && tactic_.candidate == kHeuristic)
    log(Severity::kWARNING, "%s %s: was timed with a kernel that this library does not have; the heuristic chooses",
        layer_.variant->name, layer_.name.c_str());
  m_ = 0;
  return 0;
}

int32_t SparseGemmPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                        const PluginTensorDesc* outputs, int32_t output_count) noexcept try {
  const std::string what = fault(inputs, input_count, outputs, output_count);
  if (!what.empty()) return fail(what);
  const esparse_gemm now = problem(tokens(inputs[0].dims), inputs[0].type);
  if (now.m != m_) candidate_ = choose(now);  // without a GPU there is none; only enqueue must have one
  m_ = now.m;
  return 0;
} catch (const std::exception& error) {
  return fail(error.what());
}

int32_t SparseGemmPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                                  const void* const* inputs, void* const* outputs, void* workspace,
                                  cudaStream_t stream) noexcept {
  esparse_gemm now = problem(tokens(input_descs[0].dims), input_descs[0].type);
  if (now.m == 0) return 0;
  const Variant& variant = *layer_.variant;
  now.x = inputs[0];
  now.values = inputs[1];
  now.metadata = static_cast<const int32_t*>(inputs[2]);
  now.bias = variant.bias ? inputs[3] : nullptr;
  now.permutation = variant.permutation ? static_cast<const int32_t*>(inputs[variant.permutation_index()]) : nullptr;
  now.y = outputs[0];

  const int32_t candidate = now.m == m_ ? candidate_ : choose(now);
  if (candidate == kHeuristic) return fail("no kernel of this library runs it on this GPU");
  // Programmatic: weights are constants of the network, so a kernel may fetch them before the layer above has ended.
  // The workspace holds what getWorkspaceSize planned, which is enough for any candidate that `choose` gives.
  const esparse_launch launch{stream, workspace, esparse_workspace_bytes(&now, candidate), true};
  esparse_message message{};
  return esparse_gemm_run(&now, candidate, &launch, &message) == ESPARSE_SUCCESS ? 0 : fail(message.text);
}

nvinfer1::IPluginV3* SparseGemmPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection* SparseGemmPlugin::getFieldsToSerialize() noexcept try {
  using nvinfer1::PluginField;
  using nvinfer1::PluginFieldType;
  const auto characters = [](const char* name, const char* data, size_t length) {
    return PluginField(name, data, PluginFieldType::kCHAR, static_cast<int32_t>(length));
  };
  stored_.k = static_cast<int32_t>(layer_.k);
  stored_.n = static_cast<int32_t>(layer_.n);
  stored_.fields = {characters("pattern", kPattern, sizeof kPattern - 1),
                    PluginField("in_features", &stored_.k, PluginFieldType::kINT32, 1),
                    PluginField("out_features", &stored_.n, PluginFieldType::kINT32, 1),
                    characters("layout", kLayout, sizeof kLayout - 1),
                    characters("choices", layer_.choices.data(), layer_.choices.size()),
                    characters("kernel_set", layer_.kernel_set.data(), layer_.kernel_set.size())};
  stored_.collection = {static_cast<int32_t>(stored_.fields.size()), stored_.fields.data()};
  return &stored_.collection;
} catch (const std::bad_alloc&) {
  return nullptr;
}

// --- shared ----------------------------------------------------------------------------------------------------------

// The problem without its tensors; bias and permutation are there or not, which is all that planning looks at.
esparse_gemm SparseGemmPlugin::problem(int64_t m, DataType type) const {
  static const int32_t present = 0;
  esparse_gemm gemm{};
  gemm.m = m;
  gemm.n = layer_.n;
  gemm.k = layer_.k;
  gemm.dtype = type == DataType::kBF16 ? ESPARSE_BF16 : ESPARSE_FP16;
  gemm.bias = layer_.variant->bias ? &present : nullptr;
  gemm.permutation = layer_.variant->permutation ? &present : nullptr;
  return gemm;
}

int32_t SparseGemmPlugin::choose(const esparse_gemm& problem) const {
  esparse_gpu gpu;
  if (problem.m == 0 || esparse_current_gpu(&gpu, nullptr) != ESPARSE_SUCCESS) return kHeuristic;
  return select(problem, gpu, choices_, tactic_, layer_.kernel_set != esparse_kernel_set());
}

// What is wrong with the tensors; empty if nothing is.
std::string SparseGemmPlugin::fault(const PluginTensorDesc* inputs, int32_t input_count,
                                    const PluginTensorDesc* outputs, int32_t output_count) const {
  const Variant& variant = *layer_.variant;
  const int64_t n = layer_.n, k = layer_.k;
  if (input_count != variant.inputs() || output_count != 1)
    return "has " + std::to_string(input_count) + " inputs and " + std::to_string(output_count) + " outputs, needs " +
           std::to_string(variant.inputs()) + " and 1";
  const PluginTensorDesc &x = inputs[0], &values = inputs[1], &metadata = inputs[2], &y = outputs[0];
  if (!is_half(x.type)) return "x has data type " + std::to_string(static_cast<int>(x.type)) + ", needs fp16 or bf16";
  if (x.dims.nbDims < 1 || x.dims.d[x.dims.nbDims - 1] != k)
    return "x is " + text(x.dims) + ", its last dimension must be in_features, " + std::to_string(k);
  if (tokens(x.dims) > kMostTokens)
    return "x has " + std::to_string(tokens(x.dims)) + " tokens, at most " + std::to_string(kMostTokens) +
           " are possible";
  if (!same(values.dims, {n, k / 2}))
    return "values are " + text(values.dims) + ", must be [out_features, in_features / 2] = [" + std::to_string(n) +
           ", " + std::to_string(k / 2) + "]";
  const int64_t words = volume(metadata.dims.d, metadata.dims.nbDims);
  if (words != esparse_metadata_words(n, k))
    return "metadata has " + std::to_string(words) + " words, must have " +
           std::to_string(esparse_metadata_words(n, k)) + " (layout " + kLayout + ")";
  if (variant.bias && !same(inputs[3].dims, {n}))
    return "bias is " + text(inputs[3].dims) + ", must be [" + std::to_string(n) + "]";
  if (variant.permutation && !same(inputs[variant.permutation_index()].dims, {k}))
    return "permutation is " + text(inputs[variant.permutation_index()].dims) + ", must be [" + std::to_string(k) + "]";
  if (values.type != x.type || y.type != x.type || (variant.bias && inputs[3].type != x.type))
    return "x, values, bias and y differ in type";
  if (metadata.type != DataType::kINT32 ||
      (variant.permutation && inputs[variant.permutation_index()].type != DataType::kINT32))
    return "metadata and permutation must be int32";
  Dims expected = x.dims;
  expected.d[expected.nbDims - 1] = n;
  if (y.dims.nbDims != expected.nbDims || !std::equal(expected.d, expected.d + expected.nbDims, y.dims.d))
    return "y is " + text(y.dims) + ", must be " + text(expected);
  return "";
}

int32_t SparseGemmPlugin::fail(const std::string& what) const {
  log(Severity::kERROR, "%s %s: %s", layer_.variant->name, layer_.name.c_str(), what.c_str());
  return 1;
}

}  // namespace esparse
