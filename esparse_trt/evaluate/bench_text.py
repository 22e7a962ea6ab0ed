"""A benchmark as text: Markdown tables, and where sparse starts and stops paying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from esparse_trt.estimate.check import Gain, check
from esparse_trt.evaluate.bench_record import PAPER_SAVING, Bench, Cell, Measured

Row = Sequence[str]


def markdown(bench: Bench) -> str:
    """Everything that a run measured, as Markdown."""
    parts = [heading(bench), end_to_end(bench)]
    parts += [
        f"- batch {item.batch}, prompt {item.prompt}: not measured, {item.reason}" for item in bench.left_out
    ]
    parts += [f"- {line}" for line in [*findings(bench), *facts(bench)]]
    if bench.predictions:
        parts += ["", predictions(bench)]
    if bench.layers:
        parts += ["", layers(bench)]
    if bench.engines:
        parts += ["", engines(bench)]
    return "\n".join(parts)


def heading(bench: Bench) -> str:
    """What was measured, on what, and by which command."""
    setting = bench.setting
    return (
        f"**{setting.model}**, {setting.dtype}, `{bench.command}` on one {setting.device.name}: "
        f"{setting.generated} tokens after each prompt, medians (dense → sparse)\n"
    )


def end_to_end(bench: Bench) -> str:
    """A row for each cell."""
    titles = (
        "batch", "prompt", "tokens/s", "gain", "first token, ms", "gain", "token p50, ms", "token p99, ms",
        "peak GiB", "J/token",
    )  # fmt: skip
    return table(titles, (cell_row(cell) for cell in bench.cells))


def cell_row(cell: Cell) -> Row:
    """The figures of a cell, dense → sparse."""

    def both(figure: Callable[[Measured], float | None], digits: int) -> str:
        values = [figure(side) for side in (cell.dense, cell.sparse)]
        return " → ".join("–" if value is None else f"{value:,.{digits}f}" for value in values)

    return (
        str(cell.batch) + ("" if cell.interleaved else " *"),
        f"{cell.prompt}",
        both(lambda side: 1e3 * cell.batch / side.decode.median, 0),
        f"{cell.decode_speedup:.2f}x",
        both(lambda side: side.prefill.median, 1),
        f"{cell.prefill_speedup:.2f}x",
        both(lambda side: side.decode.median, 2),
        both(lambda side: side.decode.p99, 2),
        both(lambda side: side.peak_bytes / 2**30, 1),
        both(lambda side: side.joules_per_token, 2),
    )


def facts(bench: Bench) -> list[str]:
    """Memory, answers, and what the figures hold for, a line each."""
    lines = []
    if bench.layer_ratio is not None:
        dense, sparse = (side.weight_bytes / 2**30 for side in (bench.dense, bench.sparse))
        lines.append(
            f"weights on the GPU: {dense:.2f} → {sparse:.2f} GiB, {bench.weight_saving:.1%} less (the paper: "
            f"{PAPER_SAVING:.1%}); pruned layers take {bench.layer_ratio:.4f} of dense"
        )
    if check := bench.logits:
        lines.append(
            f"logits over {check.steps} teacher-forced steps: {check.error:.1e} relative L2 from the masked "
            f"dense model (limit {check.limit:g}, worst step {check.worst:.1e})"
        )
        if check.dense_rounding is not None and check.sparse_rounding is not None:
            lines[-1] += (
                f"; from the same in fp32 the dense model is {check.dense_rounding:.1e}, the sparse one "
                f"{check.sparse_rounding:.1e}"
            )
    versions = ", ".join(f"{name} {version}" for name, version in bench.setting.versions.items())
    lines.append(
        f"dense: {bench.dense_model}; driver {bench.setting.device.driver}, {versions}{clocks(bench)}"
    )
    if any(not cell.interleaved for cell in bench.cells):
        lines.append("* one model after the other, as both KV caches do not fit together")
    if bench.no_energy:
        lines.append(f"no energy and no clocks: {bench.no_energy}")
    return lines


def clocks(bench: Bench) -> str:
    """The range of SM clocks while decoding."""
    found = [side.sm_mhz for cell in bench.cells for side in (cell.dense, cell.sparse) if side.sm_mhz]
    if not found:
        return ""
    limit = bench.setting.device.power_limit_w
    power = f", power limit {limit:.0f} W" if limit else ""
    return f", SM clock {min(found)} to {max(found)} MHz of {bench.setting.device.max_sm_mhz}{power}"


def layers(bench: Bench) -> str:
    """A row for each GEMM; times at every M as sparse / dense, and the share of the floor."""
    tokens = sorted({time.m for row in bench.layers for time in row.times})
    titles = ("GEMM", "N x K", "count", *(f"M = {m}, us" for m in tokens), "runs", "why")
    rows = []
    for row in bench.layers:
        times = {time.m: time for time in row.times}
        cells = []
        for m in tokens:
            time = times.get(m)
            if time is None:
                cells.append("–")
            else:
                cells.append(f"{time.sparse_us:.1f} / {time.dense_us:.1f} ({time.share_of_floor:.0%})")
        n, k = row.shape
        runs = "sparse" if row.sparse else "dense"
        rows.append((row.site, f"{n} x {k}", str(row.count), *cells, runs, row.reason))
    note = "Sparse / dense microseconds of each GEMM, weights out of cache (share of the floor):\n\n"
    return note + table(titles, rows, left=("GEMM", "runs", "why"))


def predictions(bench: Bench) -> str:
    """A row for each cell: the gains that `esparse-trt estimate` predicts, and how far off they are."""
    rows = [
        (str(item.batch), str(item.prompt), *_gain(item.decode), *_gain(item.prefill))
        for item in check(bench)
    ]
    gain = ("predicted", "error")
    titles = ("batch", "prompt", "gain per token", *gain, "gain of the first token", *gain)
    return f"What `esparse-trt estimate` predicts from the configuration alone:\n\n{table(titles, rows)}"


def _gain(gain: Gain) -> Row:
    return f"{gain.measured:.2f}x", f"{gain.predicted:.2f}x", f"{gain.error:+.0%}"


def engines(bench: Bench) -> str:
    """A row for each TensorRT engine and cell."""
    rows = [
        (
            item.file,
            str(item.batch),
            str(item.prompt),
            *("–" if found is None else f"{found.median:.2f}" for found in (item.prefill, item.decode)),
        )
        for item in bench.engines
    ]
    return table(("engine", "batch", "prompt", "prefill, ms", "step, ms"), rows, left=("engine",))


def table(titles: Row, rows: Iterable[Row], left: Sequence[str] = ()) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---" if title in left else "---:" for title in titles]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))


# --- where sparse pays -----------------------------------------------------------------------------------


def findings(bench: Bench) -> list[str]:
    """Where sparse is faster end to end, and where it is not, in words."""
    if not bench.cells:
        return []
    return [
        _finding("decoding", bench.cells, lambda cell: cell.decode_speedup),
        _finding("the first token", bench.cells, lambda cell: cell.prefill_speedup),
    ]


def _finding(what: str, cells: Sequence[Cell], speedup: Callable[[Cell], float]) -> str:
    lost = [cell for cell in cells if speedup(cell) <= 1]
    best, worst = max(cells, key=speedup), min(cells, key=speedup)
    at = f"{speedup(best):.2f}x at batch {best.batch}, prompt {best.prompt}"
    if not lost:
        least = f"{speedup(worst):.2f}x at batch {worst.batch}, prompt {worst.prompt}"
        return f"{what}: sparse is faster in all {len(cells)} cells, at most {at}, at least {least}"
    where = ", ".join(f"{cell.batch} x {cell.prompt}" for cell in lost)
    if len(lost) == len(cells):
        return f"{what}: sparse does not pay in any of the {len(cells)} cells, at best {at}"
    return f"{what}: at most {at}; sparse does not pay at batch x prompt {where}"
