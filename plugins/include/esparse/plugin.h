/* What libesparse_trt_plugin.so says about itself; everything else in it is for TensorRT. */
#ifndef ESPARSE_PLUGIN_H
#define ESPARSE_PLUGIN_H

#include "esparse/sparse_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t tensorrt_major; /* of the headers that it was compiled with */
  const char* version;    /* esparse_version() */
  const char* layout;     /* of the weights that it reads: "es24-v1" */
  const char* kernel_set; /* esparse_kernel_set() */
} esparse_plugin_about;

ESPARSE_API const esparse_plugin_about* esparse_about_plugin(void);

#ifdef __cplusplus
}
#endif

#endif
