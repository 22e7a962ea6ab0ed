// 128 rows x 128 tokens: 256 and 512 tokens, where tiles of twice the rows leave multiprocessors idle.
#define CUTLASS_ENABLE_GDC_FOR_SM90 1  // programmatic dependent launch
#include "cutlass_kernel.cuh"

namespace esparse {

void add_cutlass_128x128(Candidates& all) {
  add_cutlass_kernel<128, 128, 1, 2, CutlassKind::kCooperative>(all);
}

}  // namespace esparse
