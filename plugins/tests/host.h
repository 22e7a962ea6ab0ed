// A host that drives libesparse_trt_plugin.so as TensorRT does, without TensorRT: it loads the library, takes its
// creators, and calls the build and runtime interfaces of the layers they make, in TensorRT's order.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "esparse/plugin.h"
#include "require.h"

namespace host {

using namespace nvinfer1;

// --- what TensorRT gives to a plugin ---------------------------------------------------------------------------------

class Logger final : public ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    (severity <= Severity::kERROR ? errors : warnings) = text;
  }

  std::string errors, warnings;  // the last of each
};

class LoggerFinder final : public ILoggerFinder {
 public:
  explicit LoggerFinder(Logger& logger) : logger_(logger) {}
  ILogger* findLogger() override { return &logger_; }

 private:
  Logger& logger_;
};

// A dimension that is a known number.
class Number final : public IDimensionExpr {
 public:
  explicit Number(int64_t value) : value_{value} { mImpl = &value_; }

 private:
  struct Value final : apiv::VDimensionExpr {
    explicit Value(int64_t v) : value(v) {}
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    int64_t value;
  } value_;
};

class Expressions final : public IExprBuilder {
 public:
  Expressions() { mImpl = &builder_; }

 private:
  struct Builder final : apiv::VExprBuilder {
    const IDimensionExpr* constant(int64_t value) override { return &numbers.emplace_back(value); }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
      return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
      return nullptr;
    }
    std::deque<Number> numbers;
  } builder_;
};

// --- tensors ---------------------------------------------------------------------------------------------------------

inline Dims dims(const std::vector<int64_t>& sizes) {
  Dims result{};
  result.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), result.d);
  return result;
}

inline PluginTensorDesc tensor(DataType type, const std::vector<int64_t>& sizes) {
  return {dims(sizes), type, TensorFormat::kLINEAR, 1.f};
}

struct Sizes {
  int64_t n, k;
};

// The inputs and the output of a layer; `lead` are the leading dimensions of x.
struct Tensors {
  Tensors(Sizes s, bool bias, bool permutation, DataType type, std::vector<int64_t> lead) {
    const auto wide = [&](int64_t last) {
      auto sizes = lead;
      sizes.push_back(last);
      return sizes;
    };
    const int64_t words = esparse_metadata_words(s.n, s.k);
    in = {tensor(type, wide(s.k)), tensor(type, {s.n, s.k / 2}),
          tensor(DataType::kINT32, {words / 256, 1, 4, 2, 8, 4})};
    if (bias) in.push_back(tensor(type, {s.n}));
    if (permutation) in.push_back(tensor(DataType::kINT32, {s.k}));
    out = {tensor(type, wide(s.n))};
  }

  std::vector<PluginTensorDesc> in, out;
};

// The same with the range of a profile.
struct Ranges {
  Ranges(const Tensors& low, const Tensors& best, const Tensors& high) {
    for (size_t i = 0; i < best.in.size(); ++i)
      in.push_back({best.in[i], low.in[i].dims, high.in[i].dims, best.in[i].dims});
    out.push_back({best.out[0], low.out[0].dims, high.out[0].dims, best.out[0].dims});
  }

  std::vector<DynamicPluginTensorDesc> in, out;
};

// --- the library and its layers --------------------------------------------------------------------------------------

// Attributes of a node, or what an engine stored of it.
class Fields {
 public:
  Fields() = default;
  explicit Fields(const PluginFieldCollection& stored) {  // copied, as into an engine file
    for (int32_t i = 0; i < stored.nbFields; ++i) {
      const PluginField& field = stored.fields[i];
      const size_t width = field.type == PluginFieldType::kCHAR ? 1 : 4;
      const std::string data(static_cast<const char*>(field.data), width * field.length);
      add(field.name, field.type, data, field.length);
    }
  }

  static Fields of(Sizes s, const std::string& choices) {
    Fields fields;
    fields.set("pattern", "2:4"), fields.set("layout", "es24-v1"), fields.set("choices", choices);
    fields.set("in_features", s.k), fields.set("out_features", s.n);
    return fields;
  }

  void set(const char* name, const char* value) { set(name, std::string(value)); }
  void set(const char* name, const std::string& value) {
    add(name, PluginFieldType::kCHAR, value, static_cast<int32_t>(value.size()));
  }
  void set(const char* name, int64_t value) {
    const auto narrow = static_cast<int32_t>(value);
    add(name, PluginFieldType::kINT32, std::string(reinterpret_cast<const char*>(&narrow), sizeof narrow), 1);
  }
  void drop(const char* name) { entries_.erase(name); }

  const PluginFieldCollection* collection() {
    fields_.clear();
    for (auto& [name, entry] : entries_) fields_.push_back({name.c_str(), entry.data.data(), entry.type, entry.length});
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

  bool operator==(const Fields& other) const { return entries_ == other.entries_; }

 private:
  struct Entry {
    PluginFieldType type;
    std::string data;
    int32_t length;
    bool operator==(const Entry& o) const { return type == o.type && data == o.data && length == o.length; }
  };

  void add(const char* name, PluginFieldType type, std::string data, int32_t length) {
    entries_[name] = {type, std::move(data), length};
  }

  std::map<std::string, Entry> entries_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

// A layer and its interfaces.
class Layer {
 public:
  explicit Layer(IPluginV3* plugin) : plugin_(plugin) {}
  explicit operator bool() const { return plugin_ != nullptr; }
  IPluginV3* operator->() const { return plugin_.get(); }

  IPluginV3OneCore& core() const { return as<IPluginV3OneCore>(PluginCapabilityType::kCORE); }
  IPluginV3OneBuild& build() const { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
  IPluginV3OneRuntime& runtime() const { return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }

  int32_t configure(const Ranges& r) const { return build().configurePlugin(r.in.data(), size(r.in), r.out.data(), 1); }
  size_t workspace(const Ranges& r) const { return build().getWorkspaceSize(r.in.data(), size(r.in), r.out.data(), 1); }
  int32_t change_shape(const Tensors& t) const {
    return runtime().onShapeChange(t.in.data(), size(t.in), t.out.data(), 1);
  }
  Layer attach() const { return Layer(runtime().attachToContext(nullptr)); }

 private:
  template <typename T>
  static int32_t size(const std::vector<T>& items) { return static_cast<int32_t>(items.size()); }

  template <typename T>
  T& as(PluginCapabilityType type) const {
    auto* capability = plugin_->getCapabilityInterface(type);
    REQUIRE(capability != nullptr);
    return static_cast<T&>(*capability);
  }

  std::unique_ptr<IPluginV3> plugin_;
};

class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW)) {
    if (!handle_) std::fprintf(stderr, "%s\n", dlerror());
    REQUIRE(handle_ != nullptr);
    symbol<void (*)(ILoggerFinder*)>("setLoggerFinder")(&finder_);
    int32_t count = 0;
    auto* creators = symbol<IPluginCreatorInterface* const* (*)(int32_t&)>("getCreators")(count);
    for (int32_t i = 0; i < count; ++i) {
      REQUIRE(std::string(creators[i]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
      auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
      creators_[creator->getPluginName()] = creator;
    }
  }

  static std::string operator_name(bool bias, bool permutation) {
    return std::string("SparseGemm") + (bias ? "Bias" : "") + (permutation ? "Permute" : "");
  }

  Layer create(const std::string& name, Fields fields, TensorRTPhase phase = TensorRTPhase::kBUILD) const {
    return Layer(creators_.at(name)->createPlugin("layer 7", fields.collection(), phase));
  }

  // What deserialising an engine makes of the layer.
  Layer restore(const Layer& layer) const {
    const Fields stored(*layer.runtime().getFieldsToSerialize());
    return create(layer.core().getPluginName(), stored, TensorRTPhase::kRUNTIME);
  }

  const esparse_plugin_about& about() const {
    return *symbol<decltype(&esparse_about_plugin)>("esparse_about_plugin")();
  }
  const std::map<std::string, IPluginCreatorV3One*>& creators() const { return creators_; }

  mutable Logger logger;

 private:
  template <typename T>
  T symbol(const char* name) const {
    void* found = dlsym(handle_, name);
    REQUIRE(found != nullptr);
    return reinterpret_cast<T>(found);
  }

  void* handle_;
  LoggerFinder finder_{logger};
  std::map<std::string, IPluginCreatorV3One*> creators_;
};

}  // namespace host
