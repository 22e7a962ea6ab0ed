// The operators esparse::SparseGemm* as a TensorRT plugin (IPluginV3). Weights are ordinary inputs of the layer, so
// TensorRT holds them, once; the plugin holds no device memory.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "choices.h"

namespace esparse {

constexpr char kNamespace[] = "esparse";
constexpr char kPluginVersion[] = "1";
constexpr char kLayout[] = "es24-v1";
constexpr char kPattern[] = "2:4";

// The inputs of an operator after x, values and metadata.
struct Variant {
  const char* name;
  bool bias;
  bool permutation;

  int32_t inputs() const { return 3 + bias + permutation; }
  int32_t permutation_index() const { return 3 + bias; }
};

constexpr Variant kVariants[] = {{"SparseGemm", false, false},
                                 {"SparseGemmBias", true, false},
                                 {"SparseGemmPermute", false, true},
                                 {"SparseGemmBiasPermute", true, true}};

// What a layer is created from, and what an engine stores of it.
struct Layer {
  const Variant* variant;
  std::string name;  // of the node, for messages
  int64_t n = 0;
  int64_t k = 0;
  std::string choices;     // as in choices.h
  std::string kernel_set;  // that the layer was built with: in an engine it may not be this library's
};

class SparseGemmPlugin final : public nvinfer1::IPluginV3,
                               public nvinfer1::IPluginV3OneCore,
                               public nvinfer1::IPluginV3OneBuild,
                               public nvinfer1::IPluginV3OneRuntime {
 public:
  SparseGemmPlugin(Layer layer, Choices choices);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return layer_.variant->name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& expressions) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;
  int32_t getNbTactics() noexcept override { return static_cast<int32_t>(tactics_.size()); }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return cache_id_.c_str(); }
  const char* getMetadataString() noexcept override { return cache_id_.c_str(); }

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  esparse_gemm problem(int64_t m, nvinfer1::DataType type) const;
  int32_t choose(const esparse_gemm& problem) const;
  std::string fault(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                    const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) const;
  int32_t fail(const std::string& what) const;

  Layer layer_;
  Choices choices_;
  std::string cache_id_;
  std::vector<int32_t> tactics_;  // of the last configurePlugin
  Tactic tactic_;
  int64_t m_ = 0;  // of the last onShapeChange, and the candidate for it
  int32_t candidate_ = kHeuristic;
  struct {
    int32_t k, n;
    nvinfer1::PluginFieldCollection collection;
    std::vector<nvinfer1::PluginField> fields;
  } stored_;  // what getFieldsToSerialize points at
};

}  // namespace esparse
