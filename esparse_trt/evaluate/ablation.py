"""`ablation.json`: ways of pruning one model, measured on the same windows, and how they rank.

Rows are compared over the windows of the text, paired: what makes a window hard for all of them cancels. A
difference whose 95 % interval contains zero is within the noise, and is called so.

With L = ln(perplexity / dense perplexity), closed = 1 − L / L(Wanda): the share of Wanda's loss that a row
wins back. It is compared with Wanda at the recipe's pattern, so rows of another pattern have none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from esparse_trt.artifacts import read_record
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.perplexity import log_ratio
from esparse_trt.records import Record

BASELINES = ("wanda", "sparsegpt")  # names of the rows that the others are compared with


class AblationRow(Record):
    """One way of pruning, measured like the others."""

    name: str
    settings: dict[str, Any] = Field(description="recipe keys that differ from the recipe of the table")
    perplexity: float
    ln_ratio: float = Field(description="ln(perplexity / dense perplexity)")
    ln_ratio_ci95: float | None = Field(description="half width of the 95 % confidence interval of ln_ratio")
    kl: float = Field(description="mean KL(dense || sparse) of the next-token distribution, nats")
    top1: float = Field(description="share of positions whose most likely token is that of the dense model")
    seconds: float = Field(description="of pruning")
    nll: list[float] = Field([], description="mean negative log-likelihood of each window, nats")


class Ablation(Record):
    """`ablation.json`: one model pruned in every way, on one text."""

    model: str
    text: str
    device: str = Field("", description="what it was pruned and measured on")
    fingerprint: str = Field(
        "", description="SHA-256 over what all rows share: model, prune section, tokens of both texts"
    )
    dense_perplexity: float
    dense_nll: list[float] = Field([], description="of the dense model; see the rows' nll")
    rows: list[AblationRow]

    def to_json(self) -> str:
        """The file's text: a field a line, the figures of all windows on one."""
        rounded = self.model_copy(update={
            "dense_nll": _rounded(self.dense_nll),
            "rows": [row.model_copy(update={"nll": _rounded(row.nll)}) for row in self.rows],
        })  # fmt: skip
        numbers = re.compile(r"\[[-\d.,\s]+\]")
        return (
            numbers.sub(lambda found: re.sub(r"\s+", " ", found[0]), rounded.model_dump_json(indent=1)) + "\n"
        )


def load_ablation(path: Path) -> Ablation | None:
    """The table of an `ablation.json`, or None where there is none.

    Raises:
        EsparseError: the file is there but cannot be read.
    """
    return read_record(
        path,
        Ablation,
        "an ablation table",
        "name a file of `esparse-trt ablate`; if it is one, move it away and run that again",
    )


def join(tables: Sequence[Ablation]) -> Ablation:
    """One table of the rows of several, as of a grid that was run on several GPUs; of one name, the last.

    Raises:
        EsparseError: they are not of the same model, prune section and texts.
    """
    first = tables[0]
    for table in tables[1:]:
        if (table.fingerprint, table.device) != (first.fingerprint, first.device):
            raise EsparseError(
                f"rows measured on {table.device} of {table.model} do not belong to those on {first.device} "
                f"of {first.model}: the models, recipes, texts or devices differ",
                fix="join tables that `esparse-trt ablate` made of one recipe, with the same version",
            )
    rows = {row.name: row for table in tables for row in table.rows}
    return first.model_copy(update={"rows": list(rows.values())})


class Difference(NamedTuple):
    """ln(perplexity of a row / perplexity of another), and the half width of its 95 % interval."""

    value: float
    ci95: float | None

    @property
    def verdict(self) -> str:
        """What the interval says: better, worse or within noise; nothing where there is none."""
        if self.ci95 is None:
            return ""
        if abs(self.value) <= self.ci95:
            return "within noise"
        return "better" if self.value < 0 else "worse"


class Ranked(NamedTuple):
    """A row and what it means beside the others.

    Attributes:
        closed: share of Wanda's loss that it wins back; None without such a row.
        closed_ci95: half width of its 95 % interval.
        against: differences to the baselines of the table, by name, its own excepted.
        best: whether nothing in the table is better by more than the noise.
    """

    row: AblationRow
    closed: float | None
    closed_ci95: float | None
    against: dict[str, Difference]
    best: bool


def rank(table: Ablation) -> list[Ranked]:
    """The rows, lowest perplexity first."""
    rows = sorted(table.rows, key=lambda row: row.perplexity)
    baselines = [row for name in BASELINES for row in rows if row.name == name]
    wanda = next((row for row in baselines if row.name == "wanda"), None)
    ranked = []
    for row in rows:
        closed, interval = _closed(table, row, wanda) if wanda else (None, None)
        against = {other.name: difference(row, other) for other in baselines if other is not row}
        best = row is rows[0] or difference(row, rows[0]).verdict == "within noise"
        ranked.append(Ranked(row, closed, interval, against, best))
    return ranked


def difference(row: AblationRow, other: AblationRow) -> Difference:
    """How two rows differ, paired over the windows; without their losses there is no interval."""
    if not row.nll or len(row.nll) != len(other.nll):
        return Difference(row.ln_ratio - other.ln_ratio, None)
    return Difference(*log_ratio(_tensor(other.nll), _tensor(row.nll)))


def _closed(table: Ablation, row: AblationRow, wanda: AblationRow) -> tuple[float | None, float | None]:
    """1 − L / L(Wanda), and its interval: that of the ratio of two means over the same windows.

    By the delta method the ratio r = mean(x) / mean(y) varies as mean(x − r·y) / mean(y) does.
    """
    if "pattern" in row.settings or wanda.ln_ratio <= 0:
        return None, None
    closed = 1 - row.ln_ratio / wanda.ln_ratio
    if not row.nll or not table.dense_nll or row is wanda:
        return closed, None
    dense, lost, wandas = (
        torch.tensor(x, dtype=torch.float64) for x in (table.dense_nll, row.nll, wanda.nll)
    )
    _, interval = log_ratio((1 - closed) * (wandas - dense), lost - dense)
    return closed, None if interval is None else interval / wanda.ln_ratio


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]
