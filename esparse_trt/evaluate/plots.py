"""The plots of the report, as inline SVG.

matplotlib knows no CSS, so every figure is drawn in placeholder colours that are then replaced by the custom
properties of the page: the same drawing is right on a light screen, a dark one and on paper. Equal input
gives equal bytes: no dates, and the salt of the generated ids is the name of the plot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from esparse_trt.evaluate.ablation import BASELINES, Ablation
from esparse_trt.evaluate.bench_record import Bench
from esparse_trt.evaluate.verify_record import Comparison
from esparse_trt.records import ChannelProfile, LayerRecord

INK, MUTED, GRID = "#0a0a01", "#0a0a02", "#0a0a03"
WIDTH = 10.6  # inches; on a desktop the text of a drawing is then as large as that of the tables
SERIES = tuple(f"#0a0b0{i}" for i in range(1, 7))
_PROPERTIES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the font of the page
    "path.simplify": False,  # would drop the zero-length strokes that `_dots` draws
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def error_by_layer(
    layers: Sequence[LayerRecord], errors: dict[str, Comparison], blocks: dict[int, Comparison]
) -> str:
    """Relative L2 error of each layer's output by block: a dot a layer, a line through the mean of each site.

    Args:
        layers: the linear layers in model order.
        errors: dense against sparse, by module name; layers without an entry are not drawn.
        blocks: the same for the outputs of whole decoder blocks, by index.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (site, rows) in enumerate(_by_site(layers).items()):
            found = _by_block(rows, lambda row: errors[row.name].relative_l2 if row.name in errors else None)
            colour = SERIES[number % len(SERIES)]
            dots = [(block, value) for block, values in found.items() for value in values]
            _dots(axes, [x for x, _ in dots], [y for _, y in dots], colour, size=4.0)
            axes.plot(list(found), [fmean(values) for values in found.values()], color=colour, label=site)
        residual = [blocks[block].relative_l2 for block in sorted(blocks)]
        axes.plot(sorted(blocks), residual, color=INK, lw=2.2, ls=(0, (1, 1.2)), label="whole block")
        axes.set_ylim(bottom=0)
        _label(axes, "decoder block", "relative L2 error")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=8, handlelength=1.2, columnspacing=1.4)

    return _svg("error", (WIDTH, 3.3), draw)


def kept_by_layer(layers: Sequence[LayerRecord]) -> str:
    """Share of the score that the mask keeps, before and after each shuffle: one panel a site."""
    sites = _by_site([row for row in layers if row.kept])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(sites), sharey=True, squeeze=False)[0]
        for axes, (site, rows) in zip(panels, sites.items(), strict=True):
            for field, label, colour, width in (
                ("natural", "original order", MUTED, 1.2),
                ("global_", "+ global shuffle", SERIES[1], 1.6),
                ("final", "+ local shuffle", SERIES[0], 1.6),
            ):
                found = _by_block(rows, attrgetter(f"kept.{field}"))
                means = [fmean(values) for values in found.values()]
                axes.plot(list(found), means, color=colour, lw=width, label=label, marker="o", ms=2.5, mew=0)
            axes.set_title(site)
            _label(axes, "decoder block", "")
        panels[0].set_ylabel("kept share of score")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1.2
        )

    return _svg("kept", (WIDTH, 3.0), draw)


def channels(profile: ChannelProfile, number: int) -> str:
    """Score (and entropy, where the score uses it) of one site's channels, before and after the shuffle."""
    rows = [("mean score", profile.score, SERIES[0])]
    if profile.entropy is not None:
        rows.insert(0, ("entropy, nats", profile.entropy, SERIES[1]))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(rows), 2, sharey="row", sharex="col", squeeze=False)
        for line, (label, values, colour) in zip(panels, rows, strict=True):
            for axes, order in zip(line, (profile.channels, profile.position), strict=True):
                _dots(axes, order, values, colour, size=2.6)
                _local_means(axes, order, values)
            line[0].set_ylabel(label)
        panels[0][0].set_title("before: original order")
        panels[0][1].set_title("after: order of the mask's groups")
        for axes in panels[-1]:
            axes.set_xlabel("channel")

    return _svg(f"channels-{number}", (WIDTH, 1.2 + 1.6 * len(rows)), draw)


def ablation(table: Ablation) -> str:
    """Log perplexity ratio of every row, with its 95 % interval where it is known; KL divergence; seconds."""
    rows = sorted(table.rows, key=lambda row: row.ln_ratio, reverse=True)
    colours = [SERIES[1] if row.name in BASELINES else SERIES[0] for row in rows]
    panels = (
        ("ln(perplexity / dense perplexity)", [row.ln_ratio for row in rows]),
        ("KL(dense ‖ sparse), nats", [row.kl for row in rows]),
        ("seconds of pruning", [row.seconds for row in rows]),
    )

    def draw(figure: Figure) -> None:
        drawn = figure.subplots(1, len(panels), sharey=True, width_ratios=(2, 1, 1))
        for axes, (label, values) in zip(drawn, panels, strict=True):
            axes.barh(range(len(rows)), values, color=colours, height=0.55, alpha=0.85)
            axes.grid(visible=True, axis="x")
            axes.grid(visible=False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(label)
        for y, row in enumerate(rows):
            if row.ln_ratio_ci95 is not None:
                drawn[0].errorbar(
                    row.ln_ratio, y, xerr=row.ln_ratio_ci95, color=INK, elinewidth=1.1, capsize=2.5
                )
        drawn[0].set_yticks(range(len(rows)), [row.name for row in rows])
        drawn[0].tick_params(axis="y", labelcolor=INK)

    return _svg("ablation", (WIDTH, 0.8 + 0.29 * len(rows)), draw)


def crossover(bench: Bench) -> str:
    """Speed-up of decoding over the batch, and of the first token over the tokens read: 1 is dense."""
    panels = (  # title, cell's attribute on x, a line for each value of, cell's attribute on y
        ("decoding", "batch", "prompt", "decode_speedup"),
        ("first token", "prompt", "batch", "prefill_speedup"),
    )

    def draw(figure: Figure) -> None:
        figures = figure.subplots(1, 2, sharey=True)
        for axes, (title, x, group, y) in zip(figures, panels, strict=True):
            for number, value in enumerate(sorted({getattr(cell, group) for cell in bench.cells})):
                cells = [cell for cell in bench.cells if getattr(cell, group) == value]
                line = sorted((getattr(cell, x), getattr(cell, y)) for cell in cells)
                colour = SERIES[number % len(SERIES)]
                axes.plot(
                    *zip(*line, strict=True), color=colour, marker="o", ms=3.5, label=f"{group} {value}"
                )
            axes.axhline(1, color=INK, lw=1.1, ls=(0, (4, 2)))
            ticks = sorted({getattr(cell, x) for cell in bench.cells})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel(x)
            axes.legend(loc="best", handlelength=1.2)
        figures[0].set_ylabel("dense time / sparse time")

    return _svg("crossover", (WIDTH, 3.3), draw)


def _by_site(layers: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """Layers inside decoder blocks, grouped by site in model order."""
    sites: dict[str, list[LayerRecord]] = {}
    for row in layers:
        if row.block is not None:
            sites.setdefault(row.site, []).append(row)
    return sites


def _by_block(
    rows: Sequence[LayerRecord], value: Callable[[LayerRecord], float | None]
) -> dict[int, list[float]]:
    """A figure of the layers of one site, by block; layers that do not have it are left out."""
    blocks: dict[int, list[float]] = {}
    for row in rows:
        found = value(row)
        if row.block is not None and found is not None:
            blocks.setdefault(row.block, []).append(found)
    return dict(sorted(blocks.items()))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _dots(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, size: float) -> None:
    """Scatter as one path of zero-length round strokes: a tenth of the bytes of one element per point."""
    gap = float("nan")
    xs = [value for point in x for value in (point, point, gap)]
    ys = [value for point in y for value in (point, point, gap)]
    axes.plot(xs, ys, color=colour, lw=size, alpha=0.55, solid_capstyle="round")


def _local_means(axes: Axes, x: Sequence[int], y: Sequence[float], parts: int = 32) -> None:
    """A line through the means of `parts` equal stretches of x: level where strong channels are spread."""
    width = (max(x) + 1) / parts
    stretches: dict[int, list[float]] = {}
    for position, value in zip(x, y, strict=True):
        stretches.setdefault(int(position / width), []).append(value)
    middles = [(part + 0.5) * width for part in sorted(stretches)]
    axes.plot(middles, [fmean(stretches[part]) for part in sorted(stretches)], color=INK, lw=1.1, alpha=0.8)


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw a figure of `size` inches and return an `<svg>` element that takes its colours from the page."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Tenths of a pixel are fine enough for paths.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{name}-", svg)  # several drawings share one document
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for colour, name_of_property in _PROPERTIES.items():
        svg = svg.replace(colour, f"var({name_of_property})")
    return svg.replace("<svg ", f'<svg class="plot" role="img" aria-labelledby="{name}-caption" ', 1).strip()
