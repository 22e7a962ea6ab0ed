// A libnvinfer with nothing but a plugin registry, to see what loading the plugin alone registers.
#include <NvInferRuntime.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreatorInterface& creator, const char* const name_space) noexcept override {
    const bool known = std::find(creators.begin(), creators.end(), &creator) != creators.end();
    if (known || name_space != std::string("esparse")) return false;
    creators.push_back(&creator);
    return true;
  }
  bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept override {
    const auto found = std::find(creators.begin(), creators.end(), &creator);
    if (found == creators.end()) return false;
    creators.erase(found);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(creators.size());
    return creators.data();
  }

  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const count) noexcept override {
    return getAllCreators(count);
  }
  IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool const) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char* const) noexcept override { return false; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
#endif

  std::vector<IPluginCreatorInterface*> creators;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
