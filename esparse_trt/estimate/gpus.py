"""GPUs as data: what NVIDIA states of each, so that times can be estimated where nothing was measured.

Tensor throughput is that of fp16 with fp32 accumulation, dense and with 2:4 sparsity, in operations per
second (a multiply-add is two). Bandwidth is bytes per second, sizes are bytes. The stated peaks are never
reached; `times.Ceiling` says how much of them is.
"""

from __future__ import annotations

from dataclasses import dataclass

from esparse_trt.errors import EsparseError

_GB, _TFLOPS = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """One GPU model.

    Attributes:
        name: what `--gpu` takes.
        title: for people.
        capability: compute capability, 10 · major + minor.
        memory, bandwidth, dense, sparse, l2: as in the module's description.
        cuda_names: how CUDA's device names begin.
        source: public document with the figures.
    """

    name: str
    title: str
    capability: int
    memory: float
    bandwidth: float
    dense: float
    sparse: float
    l2: float
    cuda_names: tuple[str, ...]
    source: str

    @property
    def kernels(self) -> str | None:
        """What should be known of this package's kernels on it; None where they were measured."""
        if self.capability == 90:
            return None
        if self.capability < 90:
            return (
                "this package's sparse kernels for it are experimental: they were never timed on such a GPU"
            )
        return "this package has no sparse kernels for it: the estimate is of what such kernels could reach"


def _gpu(
    name: str, title: str, capability: int, memory: float, bandwidth: float, dense: float, l2: float,
    cuda_names: tuple[str, ...], source: str,
) -> Gpu:  # fmt: skip
    """From GB, GB/s, TFLOP/s and MB; of all of them NVIDIA states twice the dense throughput with 2:4."""
    peak = dense * _TFLOPS
    return Gpu(
        name, title, capability, memory * _GB, bandwidth * _GB, peak, 2 * peak, l2 * 1e6, cuda_names, source
    )


_A100 = "NVIDIA A100 datasheet; Ampere architecture whitepaper"
_H100 = "NVIDIA H100 datasheet; Hopper architecture whitepaper"
_ADA = "NVIDIA Ada architecture whitepaper v2"

GPUS = (
    _gpu("a100-40gb", "A100 SXM 40GB", 80, 40, 1555, 312, 40, ("NVIDIA A100-SXM4-40GB",), _A100),
    _gpu("a100", "A100 SXM 80GB", 80, 80, 2039, 312, 40, ("NVIDIA A100-SXM4-80GB",), _A100),
    _gpu("a100-pcie", "A100 PCIe 80GB", 80, 80, 1935, 312, 40, ("NVIDIA A100 80GB PCIe",), _A100),
    _gpu("rtx3090", "GeForce RTX 3090", 86, 24, 936, 71, 6, ("NVIDIA GeForce RTX 3090",),
         "NVIDIA Ampere GA102 architecture whitepaper"),
    _gpu("l4", "L4", 89, 24, 300, 121, 48, ("NVIDIA L4",), f"NVIDIA L4 datasheet; {_ADA}"),
    _gpu("l40s", "L40S", 89, 48, 864, 362, 96, ("NVIDIA L40S",), f"NVIDIA L40S datasheet; {_ADA}"),
    _gpu("rtx4090", "GeForce RTX 4090", 89, 24, 1008, 165.2, 72, ("NVIDIA GeForce RTX 4090",), _ADA),
    _gpu("h100", "H100 SXM 80GB", 90, 80, 3350, 989.4, 50, ("NVIDIA H100 80GB HBM3",), _H100),
    _gpu("h100-pcie", "H100 PCIe 80GB", 90, 80, 2039, 756, 50, ("NVIDIA H100 PCIe",), _H100),
    _gpu("h200", "H200 SXM 141GB", 90, 141, 4800, 989.4, 50, ("NVIDIA H200",),
         "NVIDIA H200 datasheet; L2 as of the H100, the same chip"),
    _gpu("b200", "B200 SXM 180GB", 100, 180, 8000, 2250, 126, ("NVIDIA B200",),
         "NVIDIA DGX B200 datasheet, an eighth of it; Blackwell tuning guide"),
)  # fmt: skip
NAMES = tuple(gpu.name for gpu in GPUS)
DEFAULT = "h100"


def gpu_of(name: str) -> Gpu:
    """The GPU of a name of ours.

    Raises:
        EsparseError: there is none.
    """
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise EsparseError(
        f"no GPU is called {name!r} here",
        where="--gpu",
        fix=f"use one of {', '.join(NAMES)}, or add its row to esparse_trt/estimate/gpus.py",
    )


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so; None if the table lacks it."""
    found = [gpu for gpu in GPUS if any(_begins(device_name, known) for known in gpu.cuda_names)]
    return found[0] if found else None


def _begins(device_name: str, known: str) -> bool:
    """Whether the name is the known one, or goes on after a space: an L40S is no L4."""
    return device_name == known or device_name.startswith(f"{known} ")
