// Tensor maps: what the copy engine of sm_90 needs to know of a tensor in global memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace esparse {

struct TensorBox {
  CUtensorMapDataType type;
  const void* address;       // 16-byte aligned
  int rank;                  // 2 or 3, innermost dimension first in what follows
  uint64_t size[3];          // elements
  uint64_t stride_bytes[2];  // of dimensions 1 and up; multiples of 16
  uint32_t box[3];           // elements that one copy moves; what lies outside the tensor reads as 0 and is not written
  CUtensorMapSwizzle swizzle;
};

// Null on success, static text otherwise. Host work only, well under a microsecond.
const char* encode_tensor_map(const TensorBox& tensor, CUtensorMap* map);

}  // namespace esparse
