// A candidate is one kernel with one set of launch parameters: what the tuner times and the tables name.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "esparse/sparse_gemm.h"

namespace esparse {

class Candidate {
 public:
  virtual ~Candidate() = default;

  // Unique, stable between versions, [a-z0-9_]+, starting with the kernel's family.
  virtual std::string name() const = 0;

  // Why the problem cannot run on the GPU, as static text; null when it can. Looks at m, n, k, dtype, activation and at
  // which of bias and permutation are there, never through a pointer. The problem passed esparse_check.
  virtual const char* unsupported(const esparse_gemm& problem, const esparse_gpu& gpu) const = 0;

  // Whether the kernel reads x through the permutation itself. Otherwise the library permutes x into the workspace
  // first, and the kernel sees a problem without permutation.
  virtual bool reads_permuted() const { return false; }

  // Scratch memory, of the kernel alone.
  virtual size_t workspace_bytes(const esparse_gemm&) const { return 0; }

  // Enqueue; no allocation, no synchronisation. Null on success, static text otherwise.
  virtual const char* launch(const esparse_gemm& problem, const esparse_launch& launch) const = 0;
};

using Candidates = std::vector<std::unique_ptr<const Candidate>>;

// Each family adds its candidates; a family that was not compiled adds none.
void add_reference(Candidates& all);  // reference.cu
void add_decode(Candidates& all);     // decode.cu: M <= 16, mma.sp, weights straight to registers (sm90)
void add_wgmma(Candidates& all);      // wgmma.cu: our own TMA + wgmma.sp mainloop with split-K in a cluster (sm90a)
void add_cutlass(Candidates& all);    // cutlass.cu and one file per configuration: CUTLASS sm90 sparse collectives
void add_ampere(Candidates& all);     // ampere.cu: mma.sp and cp.async, any M (sm80 and newer)

}  // namespace esparse
