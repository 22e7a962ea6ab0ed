"""The table of an ablation, best row first, below the dense model: on a terminal, in Markdown, as a page."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esparse_trt.evaluate import plots
from esparse_trt.evaluate.ablation import BASELINES, Ablation, Difference, Ranked, rank
from esparse_trt.evaluate.formats import environment


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by."""

    text: str = ""
    value: float | None = None


class Line(NamedTuple):
    """A row of the table; `item` is None for the dense model."""

    item: Ranked | None
    name: str
    cells: list[Cell]


def layout(table: Ablation) -> tuple[list[str], list[Line]]:
    """Headings of the columns for which there are figures, the name's left out, and the lines."""
    headings = ["perplexity", "ln ratio ± 95 %", "closed", *(f"against {name}" for name in BASELINES)]
    headings += ["KL, nats", "top-1", "s"]
    dense = Cell(f"{table.dense_perplexity:.3f}", table.dense_perplexity)
    lines = [Line(None, "dense", [dense, *[Cell()] * (len(headings) - 1)])]
    lines += [Line(item, item.row.name, _cells(item)) for item in rank(table)]
    shown = [any(line.cells[i].text for line in lines) for i in range(len(headings))]
    return (
        [heading for heading, keep in zip(headings, shown, strict=True) if keep],
        [
            line._replace(cells=[c for c, keep in zip(line.cells, shown, strict=True) if keep])
            for line in lines
        ],
    )


def _cells(item: Ranked) -> list[Cell]:
    row = item.row
    return [
        Cell(f"{row.perplexity:.3f}", row.perplexity),
        Cell(_interval(f"{row.ln_ratio:.3f}", row.ln_ratio_ci95), row.ln_ratio),
        _closed(item),
        *(_against(item.against.get(name)) for name in BASELINES),
        Cell(f"{row.kl:.3f}", row.kl),
        Cell(f"{row.top1:.1%}", row.top1),
        Cell(f"{row.seconds:.0f}", row.seconds),
    ]


def print_table(console: Console, table: Ablation) -> None:
    """Print the rows; those that nothing beats by more than the noise are bold."""
    headings, lines = layout(table)
    title = f"{table.model}: {table.text}{f', on {table.device}' if table.device else ''}"
    shown = Table(box=None, title=Text(title), title_justify="left", pad_edge=False)
    shown.add_column("variant")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for line in lines:
        style = "dim" if line.item is None else "bold" if line.item.best else ""
        shown.add_row(Text(line.name), *(cell.text for cell in line.cells), style=style)
    console.print(shown)


def markdown(table: Ablation) -> str:
    """The rows as a Markdown table."""
    headings, lines = layout(table)
    rows = [["variant", *headings], ["---", *["---:"] * len(headings)]]
    rows += [[line.name, *(cell.text for cell in line.cells)] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(table: Ablation) -> str:
    """One HTML page: the plots and the table, no network."""
    return environment().get_template("ablation.html.j2").render(ablation=facts(table))


def facts(table: Ablation) -> dict[str, Any]:
    """What the templates read."""
    headings, lines = layout(table)
    plot = Markup(plots.ablation(table)) if table.rows else None  # matplotlib escapes text
    return {"table": table, "headings": headings, "lines": lines, "plot": plot}


def _interval(value: str, half: float | None) -> str:
    return value if half is None else f"{value} ± {half:.3f}"


def _closed(item: Ranked) -> Cell:
    if item.closed is None:
        return Cell()
    half = "" if item.closed_ci95 is None else f" ± {100 * item.closed_ci95:.1f}"
    return Cell(f"{100 * item.closed:.1f}{half}%", item.closed)


def _against(found: Difference | None) -> Cell:
    if found is None or found.ci95 is None:
        return Cell()
    noise = ", within noise" if found.verdict == "within noise" else ""
    return Cell(_interval(f"{found.value:+.3f}", found.ci95) + noise, found.value)
