// Which candidate to take where nothing was measured.
#include <cstring>

#include "candidate.h"

int32_t esparse_default_candidate(const esparse_gemm* problem, const esparse_gpu* gpu) {
  // Families lie in the order of preference for small M; the reference is last and takes everything.
  for (int32_t i = 0; i < esparse_candidate_count(); ++i)
    if (esparse_supports(problem, gpu, i, nullptr) == ESPARSE_SUCCESS) return i;
  return -1;
}
