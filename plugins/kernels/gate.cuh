// y = act(gate) up, in fp32. Both activations are gate times a logistic function:
//   silu(g) = g / (1 + e^-g),
//   gelu(g) ~ g (1 + tanh t) / 2 = g / (1 + e^-2t),  t = sqrt(2 / pi) (g + 0.044715 g^3),
// so one form, g / (1 + 2^(g (a + b g^2))), serves both without a branch.
#pragma once

#include "esparse/sparse_gemm.h"
#include "ptx.cuh"

namespace esparse {

class Gate {
 public:
  __device__ explicit Gate(esparse_activation activation)
      : linear_(activation == ESPARSE_SWIGLU ? -kLog2E : -2 * kSqrt2OverPi * kLog2E),
        cubic_(activation == ESPARSE_SWIGLU ? 0.f : 0.044715f * linear_) {}

  __device__ float operator()(float gate, float up) const {
    const float power = ptx::ex2_approx_ftz(gate * fmaf(cubic_, gate * gate, linear_));
    return gate * up * ptx::rcp_approx_ftz(1.f + power);
  }

 private:
  static constexpr float kLog2E = 1.44269504f, kSqrt2OverPi = 0.797884561f;
  float linear_, cubic_;
};

}  // namespace esparse
