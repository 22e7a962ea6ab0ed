// The CUTLASS tiles that this build was configured with (ESPARSE_CUTLASS_TILES).
#include "candidate.h"

namespace esparse {

#define ESPARSE_CUTLASS_TILE(tile) void add_cutlass_##tile(Candidates& all);
#include "cutlass_tiles.inc"
#undef ESPARSE_CUTLASS_TILE

void add_cutlass([[maybe_unused]] Candidates& all) {
#define ESPARSE_CUTLASS_TILE(tile) add_cutlass_##tile(all);
#include "cutlass_tiles.inc"
#undef ESPARSE_CUTLASS_TILE
}

}  // namespace esparse
