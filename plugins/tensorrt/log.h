// Messages of the plugin, to TensorRT's logger.
#pragma once

#include <NvInferRuntime.h>

namespace esparse {

using Severity = nvinfer1::ILogger::Severity;

// `finder` is what TensorRT gave to setLoggerFinder; without one, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

[[gnu::format(printf, 2, 3)]] void log(Severity severity, const char* format, ...);

}  // namespace esparse
