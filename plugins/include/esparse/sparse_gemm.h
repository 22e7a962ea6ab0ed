/* C ABI of the Sparse-GEMM kernels: y[M,N] = x[M,K] * W[N,K]^T + bias, W compressed 2:4 in the layout es24-v1.
 *
 * Nothing here prints, throws or allocates device memory. Every call returns a status; when it is not
 * ESPARSE_SUCCESS, the message says which argument was wrong and what it was.
 */
#ifndef ESPARSE_SPARSE_GEMM_H
#define ESPARSE_SPARSE_GEMM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ESPARSE_API __attribute__((visibility("default")))

typedef enum {
  ESPARSE_SUCCESS = 0,
  ESPARSE_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a size out of range */
  ESPARSE_NOT_SUPPORTED = 2,    /* a size that the layout cannot hold */
  ESPARSE_CUDA_ERROR = 3        /* the launch failed; the message carries CUDA's text */
} esparse_status;

typedef enum { ESPARSE_FP16 = 0, ESPARSE_BF16 = 1 } esparse_dtype;

typedef struct {
  int64_t m;                  /* tokens, 1 .. 65536 */
  int64_t n;                  /* output channels, a multiple of 8 */
  int64_t k;                  /* input channels, a multiple of 32 */
  esparse_dtype dtype;        /* of x, values, bias and y; sums are fp32 */
  const void* x;              /* [M, K] row-major, 16-byte aligned */
  const void* values;         /* [N, K/2] row-major, 16-byte aligned */
  const int32_t* metadata;    /* esparse_metadata_words(n, k) words, 16-byte aligned */
  const void* bias;           /* [N], or null */
  const int32_t* permutation; /* [K], or null: column j of W reads x[:, permutation[j]] */
  void* y;                    /* [M, N] row-major, 16-byte aligned */
} esparse_gemm;

typedef struct {
  char text[256];
} esparse_message;

/* int32 words of metadata for a layer, padding included; 0 where the layout cannot hold it. */
ESPARSE_API int64_t esparse_metadata_words(int64_t n, int64_t k);

/* Check a problem without touching the device. `message` may be null. */
ESPARSE_API esparse_status esparse_check(const esparse_gemm* problem, esparse_message* message);

/* The plain CUDA-core kernel that every other kernel is tested against. `stream` is a cudaStream_t. */
ESPARSE_API esparse_status esparse_gemm_reference(const esparse_gemm* problem, void* stream, esparse_message* message);

#ifdef __cplusplus
}
#endif

#endif
