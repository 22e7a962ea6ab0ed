"""On the quickstart model, methods rank as they should: order is asserted, digits are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from esparse_trt.ablate import run_ablation
from esparse_trt.recipe import parse_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

GRID = """
weighted: { tokens: effect }
refined: { permute: { refine: { rounds: 3, correct: 0.7 } } }
recovered: { update: { method: obs }, recover: { steps: 10, learning_rate: 0.0001 } }
"""


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Perplexity by variant, on a part of the recipe's texts and with smaller blocks, to be quick."""
    data = yaml.safe_load((RECIPES / "quickstart.yaml").read_text(encoding="utf-8"))
    data["calibration"] |= {"samples": 24, "length": 192}
    data["prune"]["permute"]["local"] = {"block": 64}
    data["verify"] |= {"samples": 8, "length": 256}
    recipe = parse_recipe({**data, "name": "quickstart"}, base=RECIPES)
    folder = tmp_path_factory.mktemp("methods")
    (folder / "grid.yaml").write_text(GRID)
    names = ["magnitude", "wanda", "e_sparse", "sparsegpt", "obs, without correction", "obs"]
    table = run_ablation(recipe, folder / "out", only=names)
    table = run_ablation(recipe, folder / "out", grid=folder / "grid.yaml")
    return {"dense": table.dense_perplexity} | {row.name: row.perplexity for row in table.rows}


def test_a_score_with_activations_beats_magnitude(perplexity: dict[str, float]):
    assert perplexity["dense"] < perplexity["wanda"] < perplexity["magnitude"]


def test_both_shuffles_beat_wanda_and_magnitude(perplexity: dict[str, float]):
    assert perplexity["e_sparse"] < perplexity["wanda"]
    assert perplexity["e_sparse"] < perplexity["magnitude"]


def test_tokens_that_count_by_what_outputs_do_help_further(perplexity: dict[str, float]):
    assert perplexity["weighted"] < perplexity["e_sparse"]


def test_swaps_that_lower_the_output_error_help_further(perplexity: dict[str, float]):
    assert perplexity["refined"] < perplexity["e_sparse"]


def test_updates_rank_by_what_they_make_up_for(perplexity: dict[str, float]):
    """SparseGPT's sweep, then permutations with descent and refit, then what was lost before a layer."""
    order = [perplexity[name] for name in ("obs", "obs, without correction", "sparsegpt", "e_sparse")]
    assert order == sorted(order)


def test_training_the_kept_weights_helps_further(perplexity: dict[str, float]):
    assert perplexity["dense"] < perplexity["recovered"] < perplexity["obs"]
