// 256 rows x 128 tokens: prefill.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1  // programmatic dependent launch
#include "cutlass_kernel.cuh"

namespace esparse {

void add_cutlass_256x128(Candidates& all) {
  add_cutlass_kernel<256, 128, 1, 2, CutlassKind::kCooperative>(all);
}

}  // namespace esparse
