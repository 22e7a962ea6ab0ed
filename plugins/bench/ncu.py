"""Counters of single launches: a process that launches each once, under NVIDIA's ncu, and what ncu prints."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from esparse_trt.errors import EsparseError

METRICS = {
    "ns": "gpu__time_duration.sum",
    "clocks": "sm__cycles_elapsed.avg",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "operands": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_gmma.avg.pct_of_peak_sustained_elapsed",
    "shared": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "bank_reads": "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "bank_writes": "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
MARK = "esparse:"  # before a label, in the name of the range around its launch

Row = dict[str, Any]


def launch_once(label: str, launch: Callable[[], None]) -> None:
    """In the process under ncu: one launch in a range of its own, after one that loads the kernel."""
    launch()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push(MARK + label)
    torch.cuda.cudart().cudaProfilerStart()
    launch()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    torch.cuda.nvtx.range_pop()


def run(command: Sequence[str]) -> dict[str, Row]:
    """Counters by label of a command that calls `launch_once`.

    Caches are flushed before each launch. The clock is left alone: a locked one is that of no real launch.

    Raises:
        EsparseError: there is no ncu, or it failed.
    """
    options = ["--profile-from-start", "off", "--nvtx", "--clock-control", "none", "--csv", "--page", "raw"]
    options += ["--print-units", "base", "--metrics", ",".join(METRICS.values())]
    try:
        done = subprocess.run(["ncu", *options, *command], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise EsparseError(
            "ncu is not on the PATH", fix="install Nsight Compute, which comes with CUDA"
        ) from error
    if done.returncode:
        raise EsparseError(
            f"ncu ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}",
            where=" ".join(command),
            fix="where it speaks of permissions (ERR_NVGPUCTRPERM), run as root or let users read counters",
        )
    return read(done.stdout)


def read(text: str) -> dict[str, Row]:
    """Counters by label from ncu's CSV: of the longest kernel where there are several, `us` of all."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))[1:]  # the first holds units
    found: dict[str, Row] = {}
    whole: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: -_number(row[METRICS["ns"]])):
        if label := _label(row):
            values = {name: _number(row[metric]) for name, metric in METRICS.items()}
            whole[label] = whole.get(label, 0.0) + values["ns"] / 1000
            found.setdefault(label, {"kernel": row["Kernel Name"], **values})
    return {label: {**row, "us": whole[label]} for label, row in found.items()}


def _label(row: Mapping[str, str]) -> str | None:
    ranges = " ".join(value for name, value in row.items() if "Push/Pop" in name)
    found = re.search(rf"{MARK}([^:]+)", ranges)
    return found[1] if found else None


def _number(text: str) -> float:
    """A number of ncu's, with commas between thousands."""
    return float(text.replace(",", ""))
