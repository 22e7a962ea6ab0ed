#pragma once

#include "esparse/sparse_gemm.h"

namespace esparse {

// Enqueue out[:, j] = x[:, permutation[j]], [M, K]. Null on success, static text otherwise.
const char* permute_columns(const esparse_gemm& problem, void* out, const esparse_launch& launch);

}  // namespace esparse
