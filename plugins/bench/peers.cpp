// The libraries that the kernels are compared with, behind a small C ABI: dense GEMM by cuBLASLt, with each of the
// algorithms that its heuristic proposes, and 2:4 GEMM by cuSPARSELt, with its algorithm search.
//
// Both compute y[M,N] = x[M,K] * W[N,K]^T with row-major x, W, y, read here as column-major y^T = W x^T. They are
// opened at run time from the paths given, so that this file needs only their headers to be built. Functions return
// null on success and a static text, or one that lives until the thread's next call, on failure.
#include <cublasLt.h>
#include <cusparseLt.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#define PEERS_API extern "C" __attribute__((visibility("default")))

namespace {

thread_local char text[256];

template <typename... Args>
const char* fail(const char* format, Args... args) {
  std::snprintf(text, sizeof text, format, args...);
  return text;
}

#define DENSE_FUNCTIONS(X)                                                                                    \
  X(cublasLtCreate) X(cublasLtGetVersion) X(cublasLtMatmulDescCreate) X(cublasLtMatmulDescSetAttribute)       \
  X(cublasLtMatmulDescDestroy) X(cublasLtMatrixLayoutCreate) X(cublasLtMatrixLayoutDestroy)                   \
  X(cublasLtMatmulPreferenceCreate) X(cublasLtMatmulPreferenceSetAttribute) X(cublasLtMatmulPreferenceDestroy) \
  X(cublasLtMatmulAlgoGetHeuristic) X(cublasLtMatmul)

#define SPARSE_FUNCTIONS(X)                                                                                   \
  X(cusparseLtInit) X(cusparseLtGetVersion) X(cusparseLtStructuredDescriptorInit)                             \
  X(cusparseLtDenseDescriptorInit) X(cusparseLtMatDescriptorDestroy) X(cusparseLtMatmulDescriptorInit)        \
  X(cusparseLtMatmulAlgSelectionInit) X(cusparseLtMatmulAlgGetAttribute) X(cusparseLtMatmulPlanInit)          \
  X(cusparseLtMatmulPlanDestroy) X(cusparseLtSpMMACompressedSize) X(cusparseLtSpMMACompress)                  \
  X(cusparseLtMatmulGetWorkspace) X(cusparseLtMatmulSearch) X(cusparseLtMatmul)

#define DECLARE(name) decltype(&::name) name = nullptr;
struct {
  DENSE_FUNCTIONS(DECLARE)
  SPARSE_FUNCTIONS(DECLARE)
} lib;

template <typename F>
bool resolve(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

#define RESOLVE(name) \
  if (!resolve(library, #name, lib.name)) return fail("%s lacks " #name, path);
#define CHECK(call)                                             \
  if (const int status_ = static_cast<int>(call); status_ != 0) \
    return fail("%s returned %d", #call, status_);

cublasLtHandle_t dense_handle;

// Older versions of cuSPARSELt have larger opaque types than the header that this was compiled with may say.
template <typename T>
struct alignas(16) Opaque {
  char storage[16384] = {};
  T* get() { return reinterpret_cast<T*>(storage); }
};

Opaque<cusparseLtHandle_t> sparse_handle;

struct DensePlan {
  cublasLtMatmulDesc_t description = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  std::vector<cublasLtMatmulHeuristicResult_t> algorithms;

  ~DensePlan() {
    if (y) lib.cublasLtMatrixLayoutDestroy(y);
    if (x) lib.cublasLtMatrixLayoutDestroy(x);
    if (w) lib.cublasLtMatrixLayoutDestroy(w);
    if (description) lib.cublasLtMatmulDescDestroy(description);
  }
};

struct SparseProblem {
  Opaque<cusparseLtMatDescriptor_t> w, x, y;
  Opaque<cusparseLtMatmulDescriptor_t> description;
  Opaque<cusparseLtMatmulAlgSelection_t> algorithm;
};

using SparsePlan = Opaque<cusparseLtMatmulPlan_t>;

const float kOne = 1.f, kZero = 0.f;

cudaDataType type_of(int dtype) { return dtype == 0 ? CUDA_R_16F : CUDA_R_16BF; }

const char* make_dense(DensePlan& plan, int64_t m, int64_t n, int64_t k, int dtype, size_t workspace_bytes, int most) {
  const cudaDataType type = type_of(dtype);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  CHECK(lib.cublasLtMatmulDescCreate(&plan.description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  CHECK(lib.cublasLtMatmulDescSetAttribute(plan.description, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                           sizeof transposed));
  CHECK(lib.cublasLtMatrixLayoutCreate(&plan.w, type, k, n, k));
  CHECK(lib.cublasLtMatrixLayoutCreate(&plan.x, type, k, m, k));
  CHECK(lib.cublasLtMatrixLayoutCreate(&plan.y, type, n, m, n));
  cublasLtMatmulPreference_t preference;
  CHECK(lib.cublasLtMatmulPreferenceCreate(&preference));
  lib.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                           sizeof workspace_bytes);
  plan.algorithms.resize(most);
  int found = 0;
  const auto status = lib.cublasLtMatmulAlgoGetHeuristic(dense_handle, plan.description, plan.w, plan.x, plan.y,
                                                         plan.y, preference, most, plan.algorithms.data(), &found);
  lib.cublasLtMatmulPreferenceDestroy(preference);
  CHECK(status);
  plan.algorithms.resize(found);
  return found ? nullptr : "cuBLASLt proposes no algorithm";
}

const char* make_sparse(SparseProblem& p, int64_t m, int64_t n, int64_t k, int dtype) {
  constexpr uint32_t kAlignment = 16;
  const cudaDataType type = type_of(dtype);
  const auto* handle = sparse_handle.get();
  CHECK(lib.cusparseLtStructuredDescriptorInit(handle, p.w.get(), n, k, k, kAlignment, type, CUSPARSE_ORDER_ROW,
                                               CUSPARSELT_SPARSITY_50_PERCENT));
  CHECK(lib.cusparseLtDenseDescriptorInit(handle, p.x.get(), k, m, k, kAlignment, type, CUSPARSE_ORDER_COL));
  CHECK(lib.cusparseLtDenseDescriptorInit(handle, p.y.get(), n, m, n, kAlignment, type, CUSPARSE_ORDER_COL));
  CHECK(lib.cusparseLtMatmulDescriptorInit(handle, p.description.get(), CUSPARSE_OPERATION_NON_TRANSPOSE,
                                           CUSPARSE_OPERATION_NON_TRANSPOSE, p.w.get(), p.x.get(), p.y.get(),
                                           p.y.get(), CUSPARSE_COMPUTE_32F));
  CHECK(lib.cusparseLtMatmulAlgSelectionInit(handle, p.algorithm.get(), p.description.get(),
                                             CUSPARSELT_MATMUL_ALG_DEFAULT));
  return nullptr;
}

const char* make_plan(SparsePlan& plan, SparseProblem& problem, size_t* compressed_bytes, size_t* scratch_bytes) {
  const auto* handle = sparse_handle.get();
  CHECK(lib.cusparseLtMatmulPlanInit(handle, plan.get(), problem.description.get(), problem.algorithm.get()));
  CHECK(lib.cusparseLtSpMMACompressedSize(handle, plan.get(), compressed_bytes, scratch_bytes));
  return nullptr;
}

template <typename Made, typename Make, typename... Args>
const char* create(void** out, Make make, Args&&... args) {
  auto made = std::make_unique<Made>();
  if (const char* error = make(*made, args...)) return error;
  *out = made.release();
  return nullptr;
}

}  // namespace

// --- opening: cuSPARSELt and cuBLASLt are independent of each other ---

PEERS_API const char* peers_open_dense(const char* path, size_t* version) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail("%s", dlerror());
  DENSE_FUNCTIONS(RESOLVE)
  CHECK(lib.cublasLtCreate(&dense_handle));
  *version = lib.cublasLtGetVersion();
  return nullptr;
}

PEERS_API const char* peers_open_sparse(const char* path, int* version) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail("%s", dlerror());
  SPARSE_FUNCTIONS(RESOLVE)
  CHECK(lib.cusparseLtInit(sparse_handle.get()));
  CHECK(lib.cusparseLtGetVersion(sparse_handle.get(), version));
  return nullptr;
}

// --- dense: `dtype` 0 is fp16, 1 is bf16; `count` algorithms, best first by the heuristic's own estimate ---

PEERS_API const char* peers_dense_create(int64_t m, int64_t n, int64_t k, int dtype, size_t workspace_bytes, int most,
                                         void** plan, int* count) {
  if (const char* error = create<DensePlan>(plan, make_dense, m, n, k, dtype, workspace_bytes, most)) return error;
  *count = static_cast<int>(static_cast<DensePlan*>(*plan)->algorithms.size());
  return nullptr;
}

PEERS_API const char* peers_dense_run(void* plan, int algorithm, const void* w, const void* x, void* y,
                                      void* workspace, size_t workspace_bytes, void* stream) {
  const auto& p = *static_cast<DensePlan*>(plan);
  CHECK(lib.cublasLtMatmul(dense_handle, p.description, &kOne, w, p.w, x, p.x, &kZero, y, p.y, y, p.y,
                           &p.algorithms[algorithm].algo, workspace, workspace_bytes,
                           static_cast<cudaStream_t>(stream)));
  return nullptr;
}

PEERS_API void peers_dense_destroy(void* plan) { delete static_cast<DensePlan*>(plan); }

// --- sparse: create; plan, compress W, search; plan again, which takes the algorithm found, for each other W; run ---

PEERS_API const char* peers_sparse_create(int64_t m, int64_t n, int64_t k, int dtype, void** problem) {
  return create<SparseProblem>(problem, make_sparse, m, n, k, dtype);
}

PEERS_API const char* peers_sparse_plan(void* problem, void** plan, size_t* compressed_bytes, size_t* scratch_bytes) {
  return create<SparsePlan>(plan, make_plan, *static_cast<SparseProblem*>(problem), compressed_bytes, scratch_bytes);
}

PEERS_API const char* peers_sparse_compress(void* plan, const void* w, void* compressed, void* scratch, void* stream) {
  CHECK(lib.cusparseLtSpMMACompress(sparse_handle.get(), static_cast<SparsePlan*>(plan)->get(), w, compressed, scratch,
                                    static_cast<cudaStream_t>(stream)));
  return nullptr;
}

// Times cuSPARSELt's algorithms with its own search, split-K included, and keeps the best in the plan and the problem.
PEERS_API const char* peers_sparse_search(void* problem, void* plan, const void* compressed, const void* x, void* y,
                                          void* workspace, size_t workspace_bytes, void* stream, int* algorithm,
                                          int* split_k) {
  auto* found = static_cast<SparseProblem*>(problem)->algorithm.get();
  auto* searched = static_cast<SparsePlan*>(plan)->get();
  auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto* handle = sparse_handle.get();
  CHECK(lib.cusparseLtMatmulSearch(handle, searched, &kOne, compressed, x, &kZero, y, y, workspace, &cuda_stream, 1));
  CHECK(lib.cusparseLtMatmulAlgGetAttribute(handle, found, CUSPARSELT_MATMUL_ALG_CONFIG_ID, algorithm,
                                            sizeof *algorithm));
  CHECK(lib.cusparseLtMatmulAlgGetAttribute(handle, found, CUSPARSELT_MATMUL_SPLIT_K, split_k, sizeof *split_k));
  size_t needed = 0;
  CHECK(lib.cusparseLtMatmulGetWorkspace(handle, searched, &needed));
  return needed <= workspace_bytes ? nullptr : fail("the algorithm needs a workspace of %zu bytes", needed);
}

PEERS_API const char* peers_sparse_run(void* plan, const void* compressed, const void* x, void* y, void* workspace,
                                       void* stream) {
  auto cuda_stream = static_cast<cudaStream_t>(stream);
  CHECK(lib.cusparseLtMatmul(sparse_handle.get(), static_cast<SparsePlan*>(plan)->get(), &kOne, compressed, x, &kZero,
                             y, y, workspace, &cuda_stream, 1));
  return nullptr;
}

PEERS_API void peers_sparse_plan_destroy(void* plan) {
  auto* p = static_cast<SparsePlan*>(plan);
  lib.cusparseLtMatmulPlanDestroy(p->get());
  delete p;
}

// After its plans.
PEERS_API void peers_sparse_destroy(void* problem) {
  auto* p = static_cast<SparseProblem*>(problem);
  for (auto* matrix : {&p->w, &p->x, &p->y}) lib.cusparseLtMatDescriptorDestroy(matrix->get());
  delete p;
}
