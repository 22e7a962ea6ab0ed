"""Fit the constants of the kernels' heuristic (plugins/kernels/heuristic.cpp) to the figures of bench.py.

    python plugins/bench/fit.py plugins/bench/results/h100_fp16.json

prints how much longer than the best candidate the library's own choice takes over the cells of that file;
then the rows of `kModels` as fitted and the same figure for them; and, to see whether they hold for layers
that they were not fitted to, the figure of every second shape with the rows fitted to the others. It needs no
GPU.

The formula and its terms are those of heuristic.cpp. What counts is the candidate that it expects to be the
fastest, so the fit minimises the mean logarithm of that one's measured time over the best one's, with a small
weight on the error of the expected times, which leads the way where the choice does not change.

bench.py stores no time of a candidate that its sieve leaves out, since it takes half as long again as the
best or more. Such a one counts as UNLISTED times the best.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esparse_trt.engine.kernels import Gpu, Kernels, Problem, load
from esparse_trt.errors import EsparseError

Floats = NDArray[np.float64]
Cell = Mapping[str, Any]

H100 = Gpu(90, 132)
HEURISTIC = Path(__file__).parents[1] / "kernels" / "heuristic.cpp"
GUESSED = ("ampere_", "reference")  # rows that no benchmark has times for
MEMORY = 22.5  # bytes per nanosecond and multiprocessor
TILE_K = 128
UNLISTED = 2.0
WEIGHT = 0.3  # of the mean squared error of the logarithm of expected times
SEARCHES = 6  # from the same start, the best of which counts
STEPS, SPREAD = 6000, 0.3  # of a search: random steps, and the size of the first in logarithms


class Tile(NamedTuple):
    """What a candidate's name says."""

    family: int
    rows: int
    tokens: int
    split: int = 1
    per_sm: int = 1
    share_x: int = 1
    share_w: int = 1
    stream_k: bool = False
    rows_first: bool = False
    divides_rest: bool = False
    fills: bool = True

    @property
    def cluster(self) -> int:
        """CTAs that run together."""
        return self.split * self.share_x * self.share_w


class Timed(NamedTuple):
    """Candidates in cells, one entry a pair: `terms [pairs, 7]` are those that no constant enters.

    Pairs of a cell are adjacent.
    """

    cell: NDArray[np.int64]
    family: NDArray[np.int64]
    terms: Floats
    us: Floats
    listed: NDArray[np.bool_]  # whether `us` was measured
    best: Floats  # by cell


def read_models() -> dict[str, tuple[float, ...]]:
    """Rows of `kModels`: part of names, the last that fits -> fixed, rate, bandwidth, tile, reduce."""
    rows = re.findall(r'{"(\w+)", ([\d., ]+)}', HEURISTIC.read_text())
    return {part: tuple(map(float, row.split(","))) for part, row in rows if part not in GUESSED}


def read_filled() -> tuple[int, ...]:
    """`kFilled`: multiprocessors that clusters of 1, 2, .. 8 CTAs fill."""
    found = re.search(r"kFilled\[\] = {([\d, ]+)}", HEURISTIC.read_text())
    assert found, f"no kFilled in {HEURISTIC}"
    return tuple(map(int, found[1].split(",")))


MODELS, FILLED = read_models(), read_filled()


def parse(name: str) -> Tile | None:
    """The tile of a candidate; None if its family is not fitted."""
    families = [i for i, part in enumerate(MODELS) if part in name]
    if not families:
        return None

    def number(key: str) -> int:
        found = re.search(rf"_{key}(\d+)", name)
        return int(found[1]) if found else 1

    if name.startswith("decode_"):
        return Tile(families[-1], 16 * number("r"), 16, number("s"), fills=False)
    rows, tokens = map(int, re.findall(r"_n?(\d+)[mx](\d+)", name)[0])
    cluster = re.search(r"_c(\d)(\d)", name)
    share_x, share_w = map(int, cluster.groups()) if cluster else (number("x"), number("w"))
    whole = number("s") == 1 and "_pingpong" not in name
    divides_rest = name.startswith("wgmma_") and share_x * share_w > 1 and whole
    flags = ("_streamk_" in name, bool(cluster) and name.endswith("n"), divides_rest)
    return Tile(families[-1], rows, tokens, number("s"), number("o"), share_x, share_w, *flags)


def waves(tile: Tile, clusters: int, steps: int) -> float:
    """How many times the clusters fill the GPU."""
    room = max(1, FILLED[tile.cluster - 1] * tile.per_sm // tile.cluster)
    if tile.stream_k:
        return max(1.0, clusters / room)
    whole, rest = divmod(clusters, room)
    if tile.divides_rest and whole and rest and rest * tile.cluster <= room and steps >= 2 * tile.cluster:
        return whole + 1 / tile.cluster
    return whole + bool(rest)


def terms(tile: Tile, cell: Cell) -> list[float]:
    """Waves, steps, operations and bytes of a step, log2(split), nanoseconds for weights, a factor."""
    n, k, m = cell["n"], cell["k"], cell["m"]
    clusters = math.ceil(n / (tile.rows * tile.share_x)) * math.ceil(m / (tile.tokens * tile.share_w))
    sharing = min(tile.per_sm, math.ceil(clusters * tile.cluster / H100.multiprocessors))
    steps = math.ceil(math.ceil(k / TILE_K) / tile.split)
    flop = 2.0 * TILE_K * tile.rows * tile.tokens
    tokens = tile.tokens if tile.fills else min(tile.tokens, m)
    fetched = TILE_K * (9 / 8 * tile.rows / tile.share_w + 2.0 * tokens / tile.share_x)
    weights = 9 / 8 * n * k / (MEMORY * H100.multiprocessors)
    factor = 1.001 if tile.rows_first else 1.0
    halvings = math.log2(tile.split)
    return [waves(tile, clusters, steps), steps, sharing * flop, sharing * fetched, halvings, weights, factor]


def timed(cells: Sequence[Cell]) -> Timed:
    """What was measured, as arrays."""
    pairs = [
        (index, tile.family, terms(tile, cell), us, name in cell["listed"])
        for index, cell in enumerate(cells)
        for name, us in cell["candidates"].items()
        if (tile := parse(name))
    ]
    cell, family, rows, us, listed = (np.array(column) for column in zip(*pairs, strict=True))
    best = np.array([min(cell["candidates"].values()) for cell in cells])
    return Timed(cell, family, rows, us, listed, best)


def expected(constants: Floats, data: Timed) -> Floats:
    """Nanoseconds that the formula expects, by pair; `constants [models, 5]`."""
    fixed, rate, bandwidth, tile, reduce = constants[data.family].T
    times, steps, flop, fetched, halvings, weights, factor = data.terms.T
    step = np.maximum(flop / rate, fetched / bandwidth)
    return factor * (fixed + np.maximum(times * (steps * step + tile + halvings * reduce), weights + tile))


def ratios(times: Floats, data: Timed) -> Floats:
    """By cell: measured time of the pair with the least `times` over that of the best."""
    cells, start, pairs = np.unique(data.cell, return_index=True, return_counts=True)
    least = np.repeat(np.minimum.reduceat(times, start), pairs)
    chosen = np.flatnonzero(times == least)
    _, first = np.unique(data.cell[chosen], return_index=True)
    return data.us[chosen[first]] / data.best[cells]


def loss(constants: Floats, data: Timed) -> float:
    """What is minimised."""
    times = expected(constants, data)
    error = np.log(times / 1000 / data.us)[data.listed]
    return float(np.log(ratios(times, data)).mean() + WEIGHT * (error**2).mean())


def fit(data: Timed, rows: Sequence[str]) -> Floats:
    """The constants of some rows, always the same from the same data."""
    found = (search(data, rows, np.random.default_rng(seed)) for seed in range(SEARCHES))
    return min(found, key=lambda constants: loss(constants, data))


def search(data: Timed, rows: Sequence[str], random: np.random.Generator) -> Floats:
    """A random search with shrinking steps."""
    best = np.array(list(MODELS.values()), dtype=np.float64)
    free = np.array([[part in rows] for part in MODELS])
    least = loss(best, data)
    for step in range(STEPS):
        size = SPREAD * (1 - step / STEPS) + 0.01
        moved = free & (random.random(best.shape) < 0.3)
        other = best * np.exp(size * random.standard_normal(best.shape) * moved)
        if (now := loss(other, data)) < least:
            best, least = other, now
    return best


def own_choice(kernels: Kernels, cells: Sequence[Cell]) -> Floats:
    """What the library's heuristic costs, by cell."""
    found = []
    for cell in cells:
        times = cell["candidates"]
        name = kernels.default(Problem(cell["m"], cell["n"], cell["k"], cell["dtype"]), H100)
        found.append(times.get(name, math.inf) / min(times.values()))
    return np.array(found)


def digits(value: float) -> str:
    """A constant with three digits or more."""
    return f"{value:.1f}" if 0 < value < 100 else f"{value:.0f}"


def summary(found: Floats) -> str:
    """Geometric mean and worst of ratios."""
    mean = math.exp(np.log(found).mean())
    return f"{mean:.3f} times the best in the geometric mean, {found.max():.2f} at worst, {len(found)} cells"


def read(path: Path, kernels: Kernels) -> list[Cell]:
    """The cells, each with all candidates of the library that can run it.

    Raises:
        EsparseError: there are none.
    """
    found: list[Cell] = []
    for cell in json.loads(path.read_text())["cells"]:
        listed = {name: us for name, us in cell["candidates"].items() if name in kernels.candidates}
        if listed:
            slow = UNLISTED * min(listed.values())
            able = kernels.supporting(Problem(cell["m"], cell["n"], cell["k"], cell["dtype"]), H100)
            times = {name: listed.get(name, slow) for name in able}
            found.append({**cell, "candidates": times, "listed": set(listed)})
    if not found:
        raise EsparseError("no cell names a candidate of this library", where=path, fix="run bench.py again")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON file of bench.py")
    parser.add_argument("--rows", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    options = parser.parse_args()
    kernels = load()
    cells = read(options.results, kernels)
    print(f"the library's choice: {summary(own_choice(kernels, cells))}")

    data = timed(cells)
    constants = fit(data, options.rows)
    print(f"fitted: {summary(ratios(expected(constants, data), data))}")
    for part, row in zip(MODELS, constants, strict=True):
        print(f'    {{"{part}", {", ".join(map(digits, row))}}},')

    shapes = sorted({(cell["n"], cell["k"]) for cell in cells})
    halves = ([c for c in cells if (c["n"], c["k"]) in shapes[first::2]] for first in (0, 1))
    seen, unseen = (timed(half) for half in halves)
    others = ratios(expected(fit(seen, options.rows), unseen), unseen)
    print(f"fitted to every second shape, on the others: {summary(others)}")


if __name__ == "__main__":
    main()
