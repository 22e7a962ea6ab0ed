"""What the figures of a benchmark hold for: the machine, its versions and its measured ceilings."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from peers import Peers

from esparse_trt.engine import timing
from esparse_trt.engine.kernels import Kernels
from esparse_trt.engine.tune import this_device


def ceilings(peers: Peers) -> dict[str, float]:
    """Bytes per second of a large read; operations per second of a large dense product."""
    big = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    sink = torch.empty(1, dtype=torch.int32, device="cuda")
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    c = torch.empty_like(a)
    contestants = {
        "read": timing.capture(lambda _: peers.read(big, sink), 4),
        "product": timing.capture(lambda _: torch.mm(a, b.t(), out=c), 4),
    }
    times = timing.measure(contestants, budget_us=150_000, warm_us=150_000)
    return {
        "read_bytes_per_s": 1e6 * big.numel() / times["read"].us,
        "dense_flop_per_s": 2e6 * size**3 / times["product"].us,
    }


def clocks() -> dict[str, str]:
    """What nvidia-smi says about clocks, power and temperature of torch's GPU now."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw.instant,power.limit,temperature.gpu"
    gpu = f"GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in answer.split(",")), strict=True))


def environment(kernels: Kernels, peers: Peers) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "device": asdict(this_device(kernels)),
        "library": {"version": kernels.version, "kernel_set": kernels.kernel_set},
        "versions": {**peers.versions, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ceilings": ceilings(peers),
        "clocks_after_ceilings": clocks(),
    }


def floor_us(m: int, n: int, k: int, ceilings: Mapping[str, float]) -> dict[str, float]:
    """The two floors in microseconds."""
    return {
        "memory": 1e6 * 0.5625 * 2 * n * k / ceilings["read_bytes_per_s"],
        "tensor": 1e6 * 2 * m * n * k / (2 * ceilings["dense_flop_per_s"]),
    }
