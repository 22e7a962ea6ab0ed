#pragma once

#include "plugin.h"

namespace esparse {

// Makes the layers of one operator, from the attributes of a node or from what an engine stored.
class SparseGemmCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit SparseGemmCreator(const Variant& variant);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return variant_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Variant& variant_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace esparse
