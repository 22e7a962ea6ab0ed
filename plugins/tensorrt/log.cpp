#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace esparse {

// TensorRT 11, and TensorRT-RTX with it, put IVersionedInterface under ILogger and ILoggerFinder, which moves their
// functions in the table of virtual functions. All other interfaces that the plugin uses while it works are the same in
// 10 and 11, so one library serves both if it knows these two in both forms. (Not in the anonymous namespace: there a
// compiler may conclude that nobody implements them.)
struct Logger10 {
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
struct LoggerFinder10 {
  virtual Logger10* findLogger() = 0;
};
struct Logger11 : nvinfer1::IVersionedInterface {
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
struct LoggerFinder11 : nvinfer1::IVersionedInterface {
  virtual Logger11* findLogger() = 0;
};

namespace {

// Major version of the TensorRT that an object with virtual functions comes from, asked from the library that holds its
// table; that of the headers where this cannot be found out.
int major_version(const void* object) {
  Dl_info library;
  if (!dladdr(*static_cast<void* const*>(object), &library)) return NV_TENSORRT_MAJOR;
  void* handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return NV_TENSORRT_MAJOR;
  const auto major = reinterpret_cast<int32_t (*)() noexcept>(dlsym(handle, "getInferLibMajorVersion"));
  dlclose(handle);  // it was open before
  return major ? major() : NV_TENSORRT_MAJOR;
}

std::atomic<void*> finder_{nullptr};
std::atomic<bool> finder_is_10_{false};

template <typename Finder>
bool send(void* finder, Severity severity, const char* text) {
  auto* logger = static_cast<Finder*>(finder)->findLogger();
  if (logger) logger->log(severity, text);
  return logger != nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) {
  finder_is_10_ = finder && major_version(finder) == 10;
  finder_ = finder;
}

void log(Severity severity, const char* format, ...) {
  char text[640];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  void* finder = finder_;
  if (finder && (finder_is_10_ ? send<LoggerFinder10>(finder, severity, text)
                               : send<LoggerFinder11>(finder, severity, text)))
    return;
  std::fprintf(stderr, "%s\n", text);
}

}  // namespace esparse
