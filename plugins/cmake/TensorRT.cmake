# The TensorRT plugin, where TensorRT's headers are found; libraries of TensorRT are not needed.
set(ESPARSE_FETCH_TENSORRT_HEADERS OFF CACHE BOOL
  "Take TensorRT's headers from a wheel of PyPI that carries them, a third party's: for CI")
set(TENSORRT_WHEEL kernel-lens==2.0.1)  # headers of TensorRT 10.14

if(ESPARSE_FETCH_TENSORRT_HEADERS)
  esparse_unpack_wheel(${TENSORRT_WHEEL} ${CMAKE_BINARY_DIR}/tensorrt_wheel)
endif()
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h
  HINTS $ENV{TENSORRT_ROOT}/include ${CMAKE_BINARY_DIR}/tensorrt_wheel/kernel_lens/include/tensorrt
  PATHS /usr/local/tensorrt/include /opt/tensorrt/include
  DOC "Folder of TensorRT's headers, 10.13 or newer")
if(TENSORRT_INCLUDE_DIR)
  message(STATUS "esparse: TensorRT's headers in ${TENSORRT_INCLUDE_DIR}")
  add_subdirectory(tensorrt)
else()
  message(STATUS "esparse: no TensorRT headers, so the plugin is not built. Set TENSORRT_INCLUDE_DIR to build it.")
endif()
