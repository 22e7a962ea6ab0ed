// 128 rows x 64 or 32 tokens, K split between CTAs: few tokens. CUTLASS's stream-K does not compile together with its
// programmatic dependent launch.
#include "cutlass_kernel.cuh"

namespace esparse {

void add_cutlass_128x64_streamk(Candidates& all) {
  add_cutlass_kernel<128, 64, 1, 1, CutlassKind::kStreamK>(all);
  add_cutlass_kernel<128, 32, 1, 1, CutlassKind::kStreamK>(all);
}

}  // namespace esparse
