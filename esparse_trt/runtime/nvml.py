"""Energy and clocks of the GPU that torch uses, from NVIDIA's management library (package `nvidia-ml-py`)."""

from __future__ import annotations

from typing import Any

import torch


class Meter:
    """Reads one GPU's counters. `open_meter` makes it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Energy of the whole GPU since its driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def sm_mhz(self) -> int:
        """Clock of the multiprocessors now."""
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def max_sm_mhz(self) -> int:
        """The highest clock that they can have."""
        return int(self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def power_limit_w(self) -> float:
        """What the GPU may draw before it lowers its clocks."""
        return self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3


def open_meter() -> Meter | str:
    """The meter of torch's current GPU, or the reason why there is none."""
    try:
        import pynvml
    except ImportError:
        return "pynvml cannot be imported: `pip install nvidia-ml-py`"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties().uuid
        meter = Meter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        meter.joules(), meter.sm_mhz(), meter.max_sm_mhz(), meter.power_limit_w()
    except pynvml.NVMLError as error:
        return f"NVML gives no energy or clocks here: {error}"
    return meter
