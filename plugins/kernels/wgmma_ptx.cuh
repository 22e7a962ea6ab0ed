// PTX instructions of the sm_90a GEMM, one a wrapper, beside those of ptx.cuh: tensor copies, cluster barriers,
// wgmma.sp.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace esparse::ptx {

// ---- Tensor copies. `barrier` counts the bytes that arrive in this CTA, `policy` is L2's, as from
// createpolicy.

__device__ inline void cp_async_bulk_tensor_2d(uint32_t to, const CUtensorMap* map, int c0, int c1, uint32_t barrier,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ inline void cp_async_bulk_tensor_3d(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2,
                                               uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "l"(policy)
      : "memory");
}

// To the same address of, and counted by the same barrier in, every CTA of the cluster whose bit in `ctas` is set.
__device__ inline void cp_async_bulk_tensor_2d_multicast(uint32_t to, const CUtensorMap* map, int c0, int c1,
                                                         uint32_t barrier, uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(barrier), "h"(ctas), "l"(policy)
      : "memory");
}

__device__ inline void cp_async_bulk_tensor_3d_multicast(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2,
                                                         uint32_t barrier, uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(ctas), "l"(policy)
      : "memory");
}

// ---- Clusters and barriers

// True in one lane of a converged warp. The compiler knows that it is one, and issues copies without a loop over lanes.
__device__ inline bool elect_sync() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

// `barrier` may lie in another CTA of the cluster (an address from mapa). Orders nothing but what this thread waited
// for: with .release.cluster it would become a fence of the whole GPU.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Store to the cluster's shared memory, counted by a barrier there.
__device__ inline void st_async_v4(uint32_t address, float a, float b, float c, float d, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
      : "memory");
}

__device__ inline void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Registers

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 matrices of 16-bit elements, stored transposed; lanes 8i .. 8i+7 hold the addresses of the stored rows of i.
__device__ inline void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ inline uint2 ld_shared_v2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

__device__ inline uint4 ld_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// ---- wgmma

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sum[64 x kTokens] += A[64x32, 2:4 sparse] B[32 x kTokens], both from shared memory, K-major. The fragment of sum is
// that of mma m16n8 with one row block a warp: sum[4j .. 4j+3] are rows g, g, g+8, g+8 and columns 8j + 2t, + 1 of it.
template <typename T, int kTokens>
struct Wgmma;

#define ESPARSE_LIST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ESPARSE_LIST_16 ESPARSE_LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ESPARSE_LIST_32 ESPARSE_LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ESPARSE_LIST_64                                                                                      \
  ESPARSE_LIST_32                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57" \
  ",%58,%59,%60,%61,%62,%63"
#define ESPARSE_LIST_96                                                                                      \
  ESPARSE_LIST_64                                                                                            \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89" \
  ",%90,%91,%92,%93,%94,%95"
#define ESPARSE_LIST_128                                                                             \
  ESPARSE_LIST_96                                                                                    \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115" \
  ",%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define ESPARSE_SUM_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define ESPARSE_SUM_8(i) ESPARSE_SUM_4(i), ESPARSE_SUM_4(i + 4)
#define ESPARSE_SUM_16(i) ESPARSE_SUM_8(i), ESPARSE_SUM_8(i + 8)
#define ESPARSE_SUM_32(i) ESPARSE_SUM_16(i), ESPARSE_SUM_16(i + 16)
#define ESPARSE_SUM_64(i) ESPARSE_SUM_32(i), ESPARSE_SUM_32(i + 32)
#define ESPARSE_SUM_96(i) ESPARSE_SUM_64(i), ESPARSE_SUM_32(i + 64)
#define ESPARSE_SUM_128(i) ESPARSE_SUM_64(i), ESPARSE_SUM_64(i + 64)

// `a`, `b`: descriptors (see wgmma.cuh); `A` .. `S`: the numbers of the operands that follow the sums. Lanes with
// lane % 4 in {2 kSelector, 2 kSelector + 1} supply the metadata; nothing is negated or transposed.
#define ESPARSE_WGMMA(T, NAME, TOKENS, SUMS, A, B, E, S)                                                   \
  template <>                                                                                              \
  struct Wgmma<T, TOKENS> {                                                                                \
    template <int kSelector>                                                                               \
    __device__ static void add(float (&sum)[SUMS], uint64_t a, uint64_t b, uint32_t metadata) {            \
      asm volatile(                                                                                        \
          "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                       \
          "wgmma.mma_async.sp.sync.aligned.m64n" #TOKENS "k32.f32." NAME "." NAME " {" ESPARSE_LIST_##SUMS \
          "}, " A ", " B ", " E ", " S ", p, 1, 1, 0, 0;\n}"                                               \
          : ESPARSE_SUM_##SUMS(0)                                                                          \
          : "l"(a), "l"(b), "r"(metadata), "n"(kSelector));                                                \
    }                                                                                                      \
  };
#define ESPARSE_WGMMA_TYPES(TOKENS, SUMS, A, B, E, S)    \
  ESPARSE_WGMMA(__half, "f16", TOKENS, SUMS, A, B, E, S) \
  ESPARSE_WGMMA(__nv_bfloat16, "bf16", TOKENS, SUMS, A, B, E, S)

ESPARSE_WGMMA_TYPES(16, 8, "%8", "%9", "%10", "%11")
ESPARSE_WGMMA_TYPES(32, 16, "%16", "%17", "%18", "%19")
ESPARSE_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35")
ESPARSE_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67")
ESPARSE_WGMMA_TYPES(192, 96, "%96", "%97", "%98", "%99")
ESPARSE_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131")

}  // namespace esparse::ptx
