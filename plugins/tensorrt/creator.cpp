#include "creator.h"

#include <exception>
#include <map>
#include <stdexcept>

#include "log.h"

namespace esparse {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::string read_text(const PluginField& field) {
  if (field.type != PluginFieldType::kCHAR) throw std::invalid_argument(std::string(field.name) + " is not a string");
  std::string text(static_cast<const char*>(field.data), field.data ? field.length : 0);
  text.resize(text.find_last_not_of('\0') + 1);  // some parsers count the terminator
  return text;
}

int64_t read_integer(const PluginField& field) {
  if (field.length == 1 && field.type == PluginFieldType::kINT32) return *static_cast<const int32_t*>(field.data);
  if (field.length == 1 && field.type == PluginFieldType::kINT64) return *static_cast<const int64_t*>(field.data);
  throw std::invalid_argument(std::string(field.name) + " is not an integer");
}

void require_text(const char* name, const std::string& found, const char* known) {
  if (found != known)
    throw std::invalid_argument(std::string(name) + " is '" + found + "', this library knows '" + known + "'");
}

// Raises std::invalid_argument that says which attribute is wrong.
Layer read_layer(const Variant& variant, const char* name, const nvinfer1::PluginFieldCollection& collection) {
  std::map<std::string, const PluginField*> fields;
  for (int32_t i = 0; i < collection.nbFields; ++i) fields[collection.fields[i].name] = &collection.fields[i];
  const auto required = [&](const char* field) -> const PluginField& {
    if (!fields.count(field)) throw std::invalid_argument(std::string("attribute ") + field + " is missing");
    return *fields[field];
  };
  require_text("pattern", read_text(required("pattern")), kPattern);
  require_text("layout", read_text(required("layout")), kLayout);
  Layer layer{&variant, name ? name : "", read_integer(required("out_features")), read_integer(required("in_features")),
              "", esparse_kernel_set()};
  if (esparse_metadata_words(layer.n, layer.k) == 0)
    throw std::invalid_argument("the layout holds no layer of " + std::to_string(layer.n) +
                                " out_features (a multiple of 8) and " + std::to_string(layer.k) +
                                " in_features (a multiple of 32)");
  if (fields.count("choices")) layer.choices = read_text(*fields["choices"]);
  if (fields.count("kernel_set")) layer.kernel_set = read_text(*fields["kernel_set"]);
  return layer;
}

}  // namespace

SparseGemmCreator::SparseGemmCreator(const Variant& variant)
    : variant_(variant),
      fields_{{"pattern", nullptr, PluginFieldType::kCHAR, 1},
              {"in_features", nullptr, PluginFieldType::kINT32, 1},
              {"out_features", nullptr, PluginFieldType::kINT32, 1},
              {"layout", nullptr, PluginFieldType::kCHAR, 1},
              {"choices", nullptr, PluginFieldType::kCHAR, 1}},
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* SparseGemmCreator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                                     nvinfer1::TensorRTPhase) noexcept try {
  if (!fields) throw std::invalid_argument("there are no attributes");
  Layer layer = read_layer(variant_, name, *fields);
  Choices choices;
  if (const std::string wrong = parse_choices(layer.choices, choices); !wrong.empty())
    throw std::invalid_argument("choices: " + wrong);
  for (const std::string& unknown : choices.unknown)
    log(Severity::kWARNING, "%s %s: this library (kernels %s) has no kernel '%s'; the heuristic chooses in its place",
        variant_.name, layer.name.c_str(), esparse_kernel_set(), unknown.c_str());
  if (layer.kernel_set != esparse_kernel_set())
    log(Severity::kWARNING, "%s %s: the engine was built with the kernels %s, this library has %s; build it again",
        variant_.name, layer.name.c_str(), layer.kernel_set.c_str(), esparse_kernel_set());
  return new SparseGemmPlugin(std::move(layer), std::move(choices));
} catch (const std::exception& error) {
  log(Severity::kERROR, "%s %s: %s", variant_.name, name ? name : "", error.what());
  return nullptr;
}

}  // namespace esparse
