// CUTLASS's sm90 sparse GEMM (TMA and wgmma.sp) as candidates, one class per tile and cluster.
//
// It computes y^T [N, M] = W [N, K] x^T [K, M]: CUTLASS wants the sparse matrix as its operand A, y^T column-major is
// y row-major, and es24-v1 is the order of values and metadata that its sm90 collectives read. So what CUTLASS calls
// M is our N, rows of W, and its N is our M, tokens. Its copies fill with zeros what lies outside, so K % 32 == 0 and
// N % 8 == 0 (16-byte rows) are enough.
//
// Most of the time of compiling one kernel goes into templates that kernels of one tile share, whatever their cluster
// and type: they belong in one translation unit.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>

#include "candidate.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "esparse/es24.h"

#ifndef NDEBUG
#error "CUTLASS's asserts make ptxas serialise wgmma (C7510): compile with -DNDEBUG"
#endif

namespace esparse {

// Two warpgroups share a tile. Stream-K splits the K of tiles that do not fill the GPU. Not here, as they won nowhere
// on an H100: pingpong, where our own is faster, clusters of 4 CTAs and those along the rows, tokens in tiles of 96 and
// 256, stream-K with more than 64 tokens a tile.
enum class CutlassKind { kCooperative, kStreamK };

// How the tiles of one launch are dealt out to CTAs.
struct CutlassSchedule {
  int swizzle;      // side of the square blocks of tiles that run at the same time, for reuse in L2
  bool rows_first;  // consecutive tiles lie along N (rows of W), otherwise along M (tokens)
};

template <typename Element, int kTileN, int kTileM, int kClusterN, int kClusterM, CutlassKind kKind>
struct CutlassGemm {
  static constexpr bool kStreamK = kKind == CutlassKind::kStreamK;
  using Tile = cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::Int<kTileK>>;
  using Cluster = cute::Shape<cute::Int<kClusterN>, cute::Int<kClusterM>, cute::_1>;

  // y^T = sums + bias, bias broadcast along the tokens; a null bias is zero.
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Element, float>;
  using Plus = cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float,
                                                      cutlass::FloatRoundStyle::round_to_nearest>;
  using AddBias = cutlass::epilogue::fusion::Sm90EVT<Plus, cutlass::epilogue::fusion::Sm90AccFetch, Bias>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::ColumnMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, cutlass::epilogue::TmaWarpSpecializedCooperative, AddBias>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, Mainloop, Epilogue,
      cute::conditional_t<kStreamK, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Kernel::Arguments;

  struct Device {
    std::once_flag asked;
    const char* error = nullptr;
    cutlass::KernelHardwareInfo info;
  };

  // The kernel on the current device. The driver is asked once a device: its answers take longer than a launch.
  static const Device& current_device() {
    static std::array<Device, 64> devices;
    int ordinal = 0;
    cudaGetDevice(&ordinal);
    Device& device = devices[ordinal % devices.size()];
    std::call_once(device.asked, [&] {
      const cudaError_t error = cudaFuncSetAttribute(
          cutlass::device_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
      if (error) device.error = cudaGetErrorString(error);
      device.info = cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>(ordinal);
    });
    return device;
  }

  static Arguments arguments(const esparse_gemm& p, const CutlassSchedule& schedule) {
    using Layout = typename Mainloop::SparseConfig;
    const auto shape = cute::make_shape(static_cast<int>(p.n), static_cast<int>(p.m), static_cast<int>(p.k), 1);
    Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.problem_shape = shape;
    a.mainloop.ptr_A = static_cast<const Element*>(p.values);
    a.mainloop.layout_a = Layout::fill_layoutA(shape);
    a.mainloop.ptr_B = static_cast<const Element*>(p.x);
    a.mainloop.dB = {p.k, {}, 0};
    a.mainloop.ptr_E = reinterpret_cast<const typename Mainloop::ElementE*>(p.metadata);
    a.mainloop.layout_e = Layout::fill_layoutE(shape);
    a.epilogue.thread = {{}, {static_cast<const Element*>(p.bias)}, {}};
    a.epilogue.ptr_D = static_cast<Element*>(p.y);
    a.epilogue.dD = {{}, p.n, 0};
    a.scheduler.max_swizzle_size = schedule.swizzle;
    using Order = decltype(a.scheduler.raster_order);
    a.scheduler.raster_order = schedule.rows_first ? Order::AlongM : Order::AlongN;
    return a;
  }

  // Enough on any GPU, as an engine may be planned on another one: what splitting every tile takes.
  static size_t workspace_bytes(const esparse_gemm& p, const CutlassSchedule& schedule) {
    Arguments a = arguments(p, schedule);
    a.hw_info = {0, 132, 132};  // anything but 0, which would ask the driver
    if constexpr (kStreamK) a.scheduler.splits = 2;
    return Kernel::get_workspace_size(a);
  }

  static const char* launch(const esparse_gemm& p, const CutlassSchedule& schedule, const esparse_launch& launch) {
    const Device& device = current_device();
    if (device.error) return device.error;
    const auto stream = static_cast<cudaStream_t>(launch.stream);
    Arguments a = arguments(p, schedule);
    a.hw_info = device.info;
    // Clears the barriers of split tiles, so a stream-K kernel follows a memset and must not overtake it.
    if (Kernel::initialize_workspace(a, launch.workspace, stream) != cutlass::Status::kSuccess)
      return "the workspace could not be cleared";
    auto parameters = Kernel::to_underlying_arguments(a, launch.workspace);
    if (Gemm::run(parameters, stream, nullptr, launch.programmatic && !kStreamK) != cutlass::Status::kSuccess)
      return cudaGetErrorString(cudaGetLastError());
    return nullptr;
  }
};

template <int kTileN, int kTileM, int kClusterN, int kClusterM, CutlassKind kKind>
class Cutlass final : public Candidate {
 public:
  explicit Cutlass(const CutlassSchedule& schedule) : schedule_(schedule) {}

  // cutlass_256x128_c12_w2m: tile (rows x tokens), cluster, swizzle, order; cutlass_128x64_streamk_c11_w1m.
  std::string name() const override {
    const auto number = [](int n) { return std::to_string(n); };
    std::string name = "cutlass_" + number(kTileN) + "x" + number(kTileM);
    if (kKind == CutlassKind::kStreamK) name += "_streamk";
    name += "_c" + number(kClusterN) + number(kClusterM) + "_w" + number(schedule_.swizzle);
    return name + (schedule_.rows_first ? "n" : "m");
  }

  const char* unsupported(const esparse_gemm& p, const esparse_gpu& gpu) const override {
    if (gpu.capability != 90) return "needs compute capability 9.0";
    if (p.activation) return "has no activation";
    if (p.n >= 1 << 24 || p.k >= 1 << 24) return "n and k must be below 2^24";
    if (kKind == CutlassKind::kStreamK && p.m > 512) return "m is more than 512, its workspace would grow with m";
    // The rest would be another candidate's launch under a second name.
    const int64_t tiles = std::min(ceil_div(p.n, kTileN), ceil_div(p.m, kTileM));
    if (schedule_.swizzle > 1 && tiles < schedule_.swizzle) return "fewer tiles than the swizzle";
    return nullptr;
  }

  size_t workspace_bytes(const esparse_gemm& p) const override {
    return p.dtype == ESPARSE_FP16 ? Fp16::workspace_bytes(p, schedule_) : Bf16::workspace_bytes(p, schedule_);
  }

  const char* launch(const esparse_gemm& p, const esparse_launch& launch) const override {
    return p.dtype == ESPARSE_FP16 ? Fp16::launch(p, schedule_, launch) : Bf16::launch(p, schedule_, launch);
  }

 private:
  using Fp16 = CutlassGemm<cutlass::half_t, kTileN, kTileM, kClusterN, kClusterM, kKind>;
  using Bf16 = CutlassGemm<cutlass::bfloat16_t, kTileN, kTileM, kClusterN, kClusterM, kKind>;
  CutlassSchedule schedule_;
};

// The candidates of one kernel. Other swizzles, and a number of splits that CUTLASS does not choose itself, were at
// most 2 % faster anywhere.
template <int kTileN, int kTileM, int kClusterN, int kClusterM, CutlassKind kKind>
void add_cutlass_kernel(Candidates& all) {
  const auto add = [&](const CutlassSchedule& schedule) {
    all.push_back(std::make_unique<Cutlass<kTileN, kTileM, kClusterN, kClusterM, kKind>>(schedule));
  };
  add({1, false});
  if (kKind == CutlassKind::kStreamK) return;
  add({1, true});
  add({2, false});
}

}  // namespace esparse
