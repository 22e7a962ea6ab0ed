// K split between CTAs: about 512 tokens, where whole tiles fill the last wave badly. CUTLASS's stream-K does not
// compile together with its programmatic dependent launch.
#include "cutlass_kernel.cuh"

namespace esparse {

void add_cutlass_256x128_streamk(Candidates& all) {
  add_cutlass_kernel<256, 128, 2, 1, CutlassKind::kStreamK>(all);
  add_cutlass_kernel<128, 128, 1, 1, CutlassKind::kStreamK>(all);
}

}  // namespace esparse
