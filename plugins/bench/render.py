"""Markdown tables and plots from the JSON file of bench.py.

python plugins/bench/render.py plugins/bench/results/h100.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shapes import names

Cell = Mapping[str, Any]

LEGEND = """\
Medians in microseconds per GEMM in a CUDA graph of a dependent chain, weights rotated past L2, contestants
interleaved; ± is half the distance between the 10th and the 90th percentile. *dense*: cuBLASLt, best of 8
algorithms; *cuSPARSELt*: after its search, a plan for each copy of the weights, padded to the M in brackets
where that is faster; *PDL*: ours with programmatic dependent launch, which the other two do not use; *floor*:
share of the floor that ours (without PDL) reaches, that of memory or of the tensor cores.
"""


def render(path: Path) -> None:
    """Write the Markdown file and the plots beside the JSON file."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(result, path.stem))
    if result["cells"]:
        plot(result, path.with_suffix(".svg"))


# --- tables ------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any], stem: str) -> str:
    """The whole page."""
    cells = sorted(result["cells"], key=lambda cell: (cell["n"] * cell["k"], cell["n"], cell["m"]))
    parts = [header(result["environment"], cells), f"![Speed-up over dense]({stem}.svg)\n", summary(cells)]
    for shape in dict.fromkeys((cell["n"], cell["k"]) for cell in cells):
        parts.append(table(shape, [cell for cell in cells if (cell["n"], cell["k"]) == shape]))
    return "\n".join(parts)


def header(environment: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """What was measured, where, with what."""
    device, library, versions = (environment[name] for name in ("device", "library", "versions"))
    read, product = (
        environment["ceilings"][name] / 1e12 for name in ("read_bytes_per_s", "dense_flop_per_s")
    )
    clocks = environment["clocks_after_ceilings"]
    facts = [
        ", ".join(sorted({cell["dtype"] for cell in cells})),
        environment["date"],
        f"driver {device['driver']}, CUDA {device['cuda']}, torch {versions['torch']}",
        f"cuBLASLt {versions['cublaslt']}, cuSPARSELt {versions['cusparselt']}",
        f"kernels {library['version']} ({library['kernel_set']})",
        f"SM clock under load {clocks.get('clocks.sm', 'unknown')}, "
        f"power limit {clocks.get('power.limit', 'unknown')}",
        f"memory is read at {read:.2f} TB/s, a dense product of 8192^3 runs at {product:.0f} TFLOP/s",
    ]
    return f"# Sparse-GEMM on {device['name']}\n\n{'; '.join(facts)}.\n\n{LEGEND}"


def summary(cells: Sequence[Cell]) -> str:
    """Medians and extremes of the ratios by M."""
    lines = [
        "Speed-ups: median over the shapes (smallest, largest).",
        "",
        "| M | shapes | over dense | with PDL | over cuSPARSELt | with PDL "
        "| faster than cuSPARSELt | with PDL |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for m in sorted({cell["m"] for cell in cells}):
        row = [cell for cell in cells if cell["m"] == m]
        ratios = [[ratio(cell, *pair) for cell in row] for pair in PAIRS]
        faster = [f"{sum(value > 1 for value in peer)} of {len(row)}" for peer in ratios[2:]]
        lines.append(f"| {' | '.join([str(m), str(len(row)), *map(spread, ratios), *faster])} |")
    return "\n".join([*lines, ""])


PAIRS = (("dense", "ours"), ("dense", "ours_pdl"), ("cusparselt", "ours"), ("cusparselt", "ours_pdl"))


def ratio(cell: Cell, slower: str, faster: str) -> float:
    """How many times as fast the second is."""
    return cell[slower]["us"] / cell[faster]["us"]


def spread(values: Sequence[float]) -> str:
    """Median and extremes."""
    return f"{median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def table(shape: tuple[int, int], cells: Sequence[Cell]) -> str:
    """The table of one shape."""
    lines = [
        f"## {shape[0]} x {shape[1]}",
        "",
        ", ".join(names().get(shape, ["no model of the list"])),
        "",
        "| M | dense | cuSPARSELt | ours | PDL "
        "| over dense | PDL over dense | over cuSPARSELt | PDL over cuSPARSELt | floor | kernel |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in cells:
        padded = cell["cusparselt"]["key"]
        times = [timed(cell[kind]) for kind in ("dense", "cusparselt", "ours", "ours_pdl")]
        times[1] += f" [{padded}]" if padded != cell["m"] else ""
        ratios = [f"{ratio(cell, *pair):.2f}" for pair in PAIRS]
        reached = f"{cell['floor_us'] / cell['ours']['us']:.0%} {cell['bound']}"
        row = [str(cell["m"]), *times, *ratios, reached, f"`{cell['ours']['key']}`"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def timed(entry: Mapping[str, float]) -> str:
    """Median and spread."""
    return f"{entry['us']:.2f} ± {(entry['p90'] - entry['p10']) / 2:.2f}"


# --- plots -------------------------------------------------------------------------------------------------


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Speed-up over dense against M: every shape as a thin line, the median as a thick one."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "esparse"  # the same file from the same figures
    cells = result["cells"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    panels = (("ours", "ours_pdl", "Sparse-GEMM"), ("cusparselt", None, "cuSPARSELt, searched"))
    for axis, (kind, chain, title) in zip(axes, panels, strict=True):
        curves: dict[tuple[int, int], dict[int, float]] = {}
        for cell in cells:
            curves.setdefault((cell["n"], cell["k"]), {})[cell["m"]] = ratio(cell, "dense", kind)
        for curve in curves.values():
            axis.plot(*zip(*sorted(curve.items()), strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(*medians(cells, kind), color="tab:blue", linewidth=2.5, label="median of the shapes")
        if chain:
            axis.plot(*medians(cells, chain), color="tab:orange", linewidth=2.5, label="median, with PDL")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=title, xlabel="tokens (M)")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
    axes[0].set_ylabel("speed-up over dense cuBLASLt")
    figure.suptitle(f"2:4 GEMM on {result['environment']['device']['name']}, weights out of cache")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def medians(cells: Sequence[Cell], kind: str) -> tuple[list[int], list[float]]:
    """Median speed-up over dense at each M."""
    tokens = sorted({cell["m"] for cell in cells})
    return tokens, [median(ratio(c, "dense", kind) for c in cells if c["m"] == m) for m in tokens]


if __name__ == "__main__":
    render(Path(sys.argv[1]))
