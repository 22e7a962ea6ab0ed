// The C ABI over the candidates: lookup, argument checks, and the permutation of x for kernels that do not read
// through one.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "candidate.h"
#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"
#include "permute.h"

namespace {

using esparse::Candidate;

struct Named {
  std::string name;
  std::unique_ptr<const Candidate> candidate;
};

const std::vector<Named>& registry() {
  static const std::vector<Named> all = [] {
    esparse::Candidates candidates;
    esparse::add_decode(candidates);
    esparse::add_wgmma(candidates);
    esparse::add_cutlass(candidates);
    esparse::add_ampere(candidates);
    esparse::add_reference(candidates);
    std::vector<Named> named;
    for (auto& candidate : candidates) named.push_back({candidate->name(), std::move(candidate)});
    return named;
  }();
  return all;
}

const Candidate* find(int32_t index) {
  const auto& all = registry();
  return index >= 0 && index < static_cast<int32_t>(all.size()) ? all[index].candidate.get() : nullptr;
}

template <typename... Args>
esparse_status fail(esparse_message* message, esparse_status status, const char* format, Args... args) {
  if (message) std::snprintf(message->text, sizeof message->text, format, args...);
  return status;
}

constexpr size_t kAlignment = 256;

// Where x goes when it is permuted first: at the start of the workspace, the kernel's own scratch behind it.
size_t permuted_bytes(const esparse_gemm& p, const Candidate& candidate) {
  if (!p.permutation || candidate.reads_permuted()) return 0;
  return esparse::ceil_div(p.m * p.k * 2, kAlignment) * kAlignment;
}

}  // namespace

int32_t esparse_candidate_count(void) { return static_cast<int32_t>(registry().size()); }

const char* esparse_candidate_name(int32_t candidate) {
  return find(candidate) ? registry()[candidate].name.c_str() : nullptr;
}

int32_t esparse_find_candidate(const char* name) {
  const auto& all = registry();
  for (size_t i = 0; name && i < all.size(); ++i)
    if (all[i].name == name) return static_cast<int32_t>(i);
  return -1;
}

const char* esparse_version(void) { return ESPARSE_VERSION; }

const char* esparse_kernel_set(void) { return ESPARSE_KERNEL_SET; }

esparse_status esparse_current_gpu(esparse_gpu* gpu, esparse_message* message) {
  constexpr int kDevices = 64;  // remembered, capability and multiprocessors in one word
  static std::atomic<uint64_t> known[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  uint64_t found = !error && device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (!error && !found) {
    int major = 0, minor = 0, multiprocessors = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    found = static_cast<uint64_t>(10 * major + minor) << 32 | static_cast<uint32_t>(multiprocessors);
    if (!error && device < kDevices) known[device].store(found, std::memory_order_relaxed);
  }
  if (error) return fail(message, ESPARSE_CUDA_ERROR, "no GPU: %s", cudaGetErrorString(error));
  *gpu = {static_cast<int32_t>(found >> 32), static_cast<int32_t>(found)};
  return ESPARSE_SUCCESS;
}

esparse_status esparse_supports(const esparse_gemm* problem, const esparse_gpu* gpu, int32_t candidate,
                                esparse_message* message) {
  const Candidate* found = find(candidate);
  if (!found) return fail(message, ESPARSE_INVALID_ARGUMENT, "there is no candidate %d", candidate);
  if (const char* reason = found->unsupported(*problem, *gpu))
    return fail(message, ESPARSE_NOT_SUPPORTED, "%s: %s", esparse_candidate_name(candidate), reason);
  return ESPARSE_SUCCESS;
}

size_t esparse_workspace_bytes(const esparse_gemm* problem, int32_t candidate) {
  const Candidate* found = find(candidate);
  if (!found) return 0;
  return permuted_bytes(*problem, *found) + found->workspace_bytes(*problem);
}

esparse_status esparse_gemm_run(const esparse_gemm* problem, int32_t candidate, const esparse_launch* launch,
                                esparse_message* message) {
  if (const esparse_status status = esparse_check(problem, message); status != ESPARSE_SUCCESS) return status;
  if (!launch) return fail(message, ESPARSE_INVALID_ARGUMENT, "launch is null");
  const Candidate* found = find(candidate);
  if (!found) return fail(message, ESPARSE_INVALID_ARGUMENT, "there is no candidate %d", candidate);
  esparse_gpu gpu;
  if (const esparse_status status = esparse_current_gpu(&gpu, message); status != ESPARSE_SUCCESS) return status;
  if (const esparse_status status = esparse_supports(problem, &gpu, candidate, message); status != ESPARSE_SUCCESS)
    return status;
  const size_t needed = esparse_workspace_bytes(problem, candidate);
  if (needed > launch->workspace_bytes || (needed && !launch->workspace))
    return fail(message, ESPARSE_INVALID_ARGUMENT, "the workspace has %zu bytes, %s needs %zu",
                launch->workspace ? launch->workspace_bytes : 0, esparse_candidate_name(candidate), needed);

  esparse_gemm inner = *problem;
  esparse_launch rest = *launch;
  if (const size_t bytes = permuted_bytes(*problem, *found)) {
    if (const char* error = esparse::permute_columns(*problem, launch->workspace, *launch))
      return fail(message, ESPARSE_CUDA_ERROR, "permuting x: %s", error);
    inner.x = launch->workspace;
    inner.permutation = nullptr;
    rest.workspace = static_cast<char*>(launch->workspace) + bytes;
    rest.workspace_bytes -= bytes;
  }
  if (const char* error = found->launch(inner, rest))
    return fail(message, ESPARSE_CUDA_ERROR, "%s: %s", esparse_candidate_name(candidate), error);
  return ESPARSE_SUCCESS;
}
