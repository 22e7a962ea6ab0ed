/* C ABI of the Sparse-GEMM kernels: y[M,N] = x[M,K] * W[N,K]^T + bias, W compressed 2:4 in the layout es24-v1; and with
 * an activation, of layers whose W holds the rows of two layers, y[M,N/2] = act(gate) * up.
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

/* What becomes of the sums. With an activation, n is a multiple of 16 and W (and the bias) holds, in turn, 8 rows of
 * gate and the 8 rows of up of the same channels: row 16 i + j is gate's row 8 i + j, row 16 i + 8 + j up's, j < 8. */
typedef enum {
  ESPARSE_NO_ACTIVATION = 0,
  ESPARSE_SWIGLU = 1, /* y = silu(gate) * up */
  ESPARSE_GEGLU = 2   /* y = gelu(gate) * up, gelu by its approximation with tanh */
} esparse_activation;

typedef struct {
  int64_t m;                  /* tokens, 1 .. 65536 */
  int64_t n;                  /* rows of W, a multiple of 8 */
  int64_t k;                  /* input channels, a multiple of 32 */
  esparse_dtype dtype;        /* of x, values, bias and y; sums are fp32 */
  esparse_activation activation;
  const void* x;              /* [M, K] row-major, 16-byte aligned */
  const void* values;         /* [N, K/2] row-major, 16-byte aligned */
  const int32_t* metadata;    /* esparse_metadata_words(n, k) words, 16-byte aligned */
  const void* bias;           /* [N], 16-byte aligned, or null */
  const int32_t* permutation; /* [K], 16-byte aligned, or null: column j of W reads x[:, permutation[j]] */
  void* y;                    /* [M, N], with an activation [M, N/2], row-major, 16-byte aligned */
} esparse_gemm;

typedef struct {
  char text[256];
} esparse_message;

/* int32 words of metadata for a layer, padding included; 0 where the layout cannot hold it. */
ESPARSE_API int64_t esparse_metadata_words(int64_t n, int64_t k);

/* Check a problem without touching the device. `message` may be null. */
ESPARSE_API esparse_status esparse_check(const esparse_gemm* problem, esparse_message* message);

/* What a candidate may depend on. Filled by esparse_current_gpu, or by hand to plan for a GPU that is not here. */
typedef struct {
  int32_t capability;      /* compute capability, 10 * major + minor: 90 for an H100 */
  int32_t multiprocessors; /* 132 for an H100 SXM */
} esparse_gpu;

typedef struct {
  void* stream;           /* cudaStream_t */
  void* workspace;        /* esparse_workspace_bytes() bytes, 256-byte aligned; may be null when those are 0 */
  size_t workspace_bytes; /* what `workspace` holds */
  int32_t programmatic;   /* nonzero: programmatic dependent launch. The kernel may start, and read weights and bias,
                             before the previous kernel of the stream has ended; x, y and the workspace wait for its
                             end. */
} esparse_launch;

/* Kernels with their launch parameters are "candidates", numbered 0 .. count - 1. Numbers may change between versions
 * of the library, names ("decode_r4k2u4s2") keep their meaning: tables and engines store names. */
ESPARSE_API int32_t esparse_candidate_count(void);
ESPARSE_API const char* esparse_candidate_name(int32_t candidate); /* null when there is no such candidate */
ESPARSE_API int32_t esparse_find_candidate(const char* name);      /* -1 when there is none of that name */

/* Version of the library, and a digest of its kernels: a table of timings is valid for one such digest. */
ESPARSE_API const char* esparse_version(void);
ESPARSE_API const char* esparse_kernel_set(void);

/* The GPU that is current in this thread. */
ESPARSE_API esparse_status esparse_current_gpu(esparse_gpu* gpu, esparse_message* message);

/* Whether the candidate can run a problem of this m, n, k, dtype, activation, bias and permutation; pointers are only
 * compared with null. ESPARSE_NOT_SUPPORTED with the reason when it cannot. */
ESPARSE_API esparse_status esparse_supports(const esparse_gemm* problem, const esparse_gpu* gpu, int32_t candidate,
                                            esparse_message* message);

/* The candidate for a problem of which nothing has been measured; always one that supports it, -1 if none does. */
ESPARSE_API int32_t esparse_default_candidate(const esparse_gemm* problem, const esparse_gpu* gpu);

/* Scratch memory of the candidate for this problem. Nothing in it outlives the call. */
ESPARSE_API size_t esparse_workspace_bytes(const esparse_gemm* problem, int32_t candidate);

/* Enqueue the problem on the launch's stream, capturable in a CUDA graph. */
ESPARSE_API esparse_status esparse_gemm_run(const esparse_gemm* problem, int32_t candidate,
                                            const esparse_launch* launch, esparse_message* message);

/* The plain CUDA-core kernel that every other kernel is tested against. `stream` is a cudaStream_t. */
ESPARSE_API esparse_status esparse_gemm_reference(const esparse_gemm* problem, void* stream, esparse_message* message);

#ifdef __cplusplus
}
#endif

#endif
