"""Ranking of ablation rows: paired intervals, the share of Wanda's loss, and how both are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from esparse_trt.cli import app
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.ablation import Ablation, AblationRow, join, load_ablation, rank
from esparse_trt.evaluate.ablation_page import layout, markdown, page

WINDOWS = 64


def row(name: str, nll: torch.Tensor, dense: torch.Tensor, **settings: object) -> AblationRow:
    return AblationRow(
        name=name, settings=settings, perplexity=math.exp(nll.mean()), ln_ratio=float((nll - dense).mean()),
        ln_ratio_ci95=0.1, kl=0.2, top1=0.8, seconds=3.0, nll=nll.tolist(),
    )  # fmt: skip


@pytest.fixture
def table() -> Ablation:
    """Windows differ by far more than methods do; `almost` differs from `good` by less than its noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(WINDOWS, generator=generator, dtype=torch.float64)

    dense = 3 + noise(1.0)
    lost = {"wanda": 0.8, "almost": 0.402, "good": 0.4, "sparsegpt": 0.42}
    rows = [row(name, dense + cost + noise(0.02), dense) for name, cost in lost.items()]
    rows.append(row("4:8", dense + 0.1 + noise(0.02), dense, pattern="4:8"))
    return Ablation(
        model="m", text="t", dense_perplexity=math.exp(dense.mean()), dense_nll=dense.tolist(), rows=rows
    )


def test_rows_are_compared_over_the_same_windows(table: Ablation):
    ranked = {item.row.name: item for item in rank(table)}
    assert [item.row.perplexity for item in ranked.values()] == sorted(r.perplexity for r in table.rows)
    found = ranked["good"].against["sparsegpt"]
    losses = {item.name: torch.tensor(item.nll, dtype=torch.float64) for item in table.rows}
    gap = losses["good"] - losses["sparsegpt"]
    assert found.value == pytest.approx(gap.mean().item())
    assert found.ci95 == pytest.approx(1.998 * gap.std().item() / math.sqrt(WINDOWS), rel=0.01)
    assert found.verdict == "better" and ranked["wanda"].against["sparsegpt"].verdict == "worse"
    assert "wanda" not in ranked["wanda"].against
    # Unpaired intervals of 0.25 would hide all of this.
    assert found.ci95 < 0.01 and losses["good"].std().item() * 2 / math.sqrt(WINDOWS) > 0.2


def test_what_noise_alone_explains_is_called_so(table: Ablation):
    same = table.model_copy(update={"rows": [item for item in table.rows if item.name != "4:8"]})
    ranked = {item.row.name: item for item in rank(same)}
    assert ranked["good"].best and ranked["almost"].best
    assert not ranked["sparsegpt"].best and not ranked["wanda"].best
    names = {"almost": "sparsegpt", "sparsegpt": "x"}
    renamed = [item.model_copy(update={"name": names.get(item.name, item.name)}) for item in same.rows]
    again = same.model_copy(update={"rows": renamed})
    (found,) = (item for item in rank(again) if item.row.name == "good")
    assert found.against["sparsegpt"].verdict == "within noise"
    (line,) = (line for line in markdown(again).splitlines() if line.startswith("| good "))
    assert "within noise" in line


def test_closed_is_the_share_of_wandas_loss_and_its_interval_covers(table: Ablation):
    ranked = {item.row.name: item for item in rank(table)}
    assert ranked["wanda"].closed == 0 and ranked["wanda"].closed_ci95 is None
    assert ranked["4:8"].closed is None  # another pattern than Wanda's
    good = ranked["good"]
    assert good.closed == pytest.approx(0.5, abs=0.01)
    dense, wanda, lost = (
        torch.tensor(values, dtype=torch.float64)
        for values in (table.dense_nll, table.rows[0].nll, table.rows[2].nll)
    )
    draws = torch.randint(WINDOWS, (4000, WINDOWS), generator=torch.Generator().manual_seed(1))
    closed = 1 - (lost - dense)[draws].mean(1) / (wanda - dense)[draws].mean(1)
    assert good.closed_ci95 == pytest.approx(2 * closed.std().item(), rel=0.08)


def test_tables_without_losses_have_no_verdicts(table: Ablation):
    old = table.model_copy(
        update={"dense_nll": [], "rows": [item.model_copy(update={"nll": []}) for item in table.rows]}
    )
    ranked = {item.row.name: item for item in rank(old)}
    assert ranked["good"].closed == pytest.approx(0.5, abs=0.01) and ranked["good"].closed_ci95 is None
    assert ranked["good"].against["sparsegpt"].verdict == ""
    assert not any("against" in heading for heading in layout(old)[0])


def test_the_file_is_short_and_reads_back(table: Ablation, tmp_path: Path):
    path = tmp_path / "ablation.json"
    path.write_text(table.to_json())
    assert len(path.read_text().splitlines()) < 16 * len(table.rows)
    read = load_ablation(path)
    assert read is not None and read.model_copy(update={"rows": [], "dense_nll": []}) == table.model_copy(
        update={"rows": [], "dense_nll": []}
    )
    assert read.rows[0].nll == pytest.approx(table.rows[0].nll, abs=1e-6)
    assert load_ablation(tmp_path / "none.json") is None
    path.write_text(json.dumps({"rows": 3}))
    with pytest.raises(EsparseError, match="not an ablation table"):
        load_ablation(path)


def test_the_command_prints_markdown_and_writes_a_page(table: Ablation, tmp_path: Path):
    (tmp_path / "ablation.json").write_text(table.to_json())
    command = ["table", str(tmp_path), "--html", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and result.stdout == markdown(load_ablation(tmp_path / "ablation.json"))
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| variant | perplexity |") and lines[2].startswith("| dense |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    shown = (tmp_path / "page.html").read_text()
    assert "<svg" in shown and "http" not in shown.replace("http://www.w3.org", "")
    for item in table.rows:
        assert item.name in shown and f"{item.perplexity:.3f}" in shown
    missing = CliRunner().invoke(app, ["table", str(tmp_path / "nothing.json")])
    assert missing.exit_code == 2 and "no ablation table there" in missing.output


def test_rows_that_were_run_apart_are_joined(table: Ablation, tmp_path: Path):
    first = table.model_copy(update={"rows": table.rows[:2]})
    second = table.model_copy(update={"rows": table.rows[1:]})
    (tmp_path / "1.json").write_text(first.to_json())
    (tmp_path / "2.json").write_text(second.to_json())
    command = [
        "table",
        str(tmp_path / "1.json"),
        str(tmp_path / "2.json"),
        "--json",
        str(tmp_path / "joined"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "joined").read_text() == table.to_json()
    with pytest.raises(EsparseError, match="do not belong"):
        join([first, second.model_copy(update={"fingerprint": "another"})])
    with pytest.raises(EsparseError, match="do not belong"):
        join([first, second.model_copy(update={"device": "another"})])


def test_names_are_escaped(table: Ablation):
    evil = "<script>alert(1)</script>"
    rows = [table.rows[0].model_copy(update={"name": evil, "settings": {evil: evil}})]
    shown = page(table.model_copy(update={"rows": rows, "model": evil, "text": evil, "device": evil}))
    assert evil not in shown and "&lt;script&gt;" in shown
