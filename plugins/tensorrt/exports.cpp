// The entry points of the library. IPluginRegistry::loadLibrary calls setLoggerFinder and getCreators; for programs
// that only dlopen their plugins (trtexec --staticPlugins, Polygraphy --plugins, Triton) loading alone registers them.
#include <dlfcn.h>

#include "creator.h"
#include "esparse/plugin.h"
#include "log.h"

namespace {

using esparse::SparseGemmCreator;

#define TEXT(x) #x
#define EXPANDED_TEXT(x) TEXT(x)
constexpr char kTensorRt[] = "libnvinfer.so." EXPANDED_TEXT(NV_TENSORRT_MAJOR);
constexpr char kTensorRtRtx[] = "libtensorrt_rtx.so.1";

SparseGemmCreator creators[] = {SparseGemmCreator(esparse::kVariants[0]), SparseGemmCreator(esparse::kVariants[1]),
                                SparseGemmCreator(esparse::kVariants[2]), SparseGemmCreator(esparse::kVariants[3])};

// The registry of the TensorRT that the process has loaded; null without one. Linking with TensorRT would do the same,
// but for one of TensorRT and TensorRT-RTX only. IPluginRegistry differs between 10 and 11, which TensorRT-RTX is like,
// so only the TensorRT of our headers is asked.
nvinfer1::IPluginRegistry* find_registry() {
  void* tensorrt = dlopen(kTensorRt, RTLD_LAZY | RTLD_NOLOAD);
  if (!tensorrt && NV_TENSORRT_MAJOR == 11) tensorrt = dlopen(kTensorRtRtx, RTLD_LAZY | RTLD_NOLOAD);
  if (!tensorrt) tensorrt = dlopen(kTensorRt, RTLD_LAZY);  // a program that loads its plugins first: Polygraphy
  void* function = tensorrt ? dlsym(tensorrt, "getPluginRegistry") : nullptr;
  return function ? reinterpret_cast<decltype(&getPluginRegistry)>(function)() : nullptr;
}

nvinfer1::IPluginRegistry* const registry = [] {
  nvinfer1::IPluginRegistry* found = find_registry();
  if (found)
    for (auto& creator : creators) found->registerCreator(creator, esparse::kNamespace);
  return found;
}();

}  // namespace

extern "C" {

ESPARSE_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { esparse::set_logger_finder(finder); }

ESPARSE_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const all[] = {&creators[0], &creators[1], &creators[2], &creators[3]};
  // loadLibrary registers what it gets here, which must not be registered already.
  if (registry)
    for (auto& creator : creators) registry->deregisterCreator(creator);
  count = 4;
  return all;
}

ESPARSE_API const esparse_plugin_about* esparse_about_plugin(void) {
  static const esparse_plugin_about about{NV_TENSORRT_MAJOR, esparse_version(), esparse::kLayout, esparse_kernel_set()};
  return &about;
}

}  // extern "C"
