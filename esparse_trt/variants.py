"""What an ablation compares: prune sections that differ from one reference in a few settings each.

A grid file lists rows of one's own, each with its changes as a recipe's `prune` section would have them:

    wanda, refit 64:
      score: { method: wanda }
      update: { method: obs, refit: 64 }
    obs, 4:8: { pattern: "4:8", update: { method: obs } }
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.ablation import BASELINES
from esparse_trt.recipe import resolve_paths
from esparse_trt.recipe_errors import describe
from esparse_trt.recipe_file import read_yaml
from esparse_trt.sections import LocalShuffle, PruneSection

_UNPERMUTED = {"global": "none", "local": None, "residual": "none"}
_MAKE_UP = {"correct": 0.7}
_OBS = {"method": "obs"}
_SPARSEGPT = {"method": "obs", "descent": 0, "refit": 0, "correct": 0.0}


@dataclass(frozen=True)
class Variant:
    """A row of the table: what it changes in the recipe's prune section, nested as in a recipe."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The changes by dotted recipe key."""
        return dict(_flat(self.changes))


VARIANTS = (
    Variant("magnitude", {"score": {"method": "magnitude"}, "permute": _UNPERMUTED}),
    Variant("wanda", {"score": {"method": "wanda"}, "permute": _UNPERMUTED}),
    Variant("ria", {"score": {"method": "ria"}, "permute": _UNPERMUTED}),
    Variant("sparsegpt", {"permute": _UNPERMUTED, "update": _SPARSEGPT}),
    Variant("e_sparse, no shuffle", {"permute": _UNPERMUTED}),
    Variant("e_sparse"),
    Variant("e_sparse, entropy off", {"score": {"information": "none"}}),
    Variant("e_sparse, differential entropy", {"score": {"information": "differential", "alpha": 1.0}}),
    Variant("e_sparse, divergence from a Gaussian", {"score": {"information": "kl"}}),
    Variant("e_sparse, mutual information", {"score": {"information": "mutual"}}),
    Variant("e_sparse, global off", {"permute": {"global": "none"}}),
    Variant("e_sparse, global sorted", {"permute": {"global": "sort"}}),
    Variant("e_sparse, local off", {"permute": {"local": None}}),
    Variant("e_sparse, local 256", {"permute": {"local": {"block": 256}}}),
    Variant("e_sparse, gather", {"permute": {"attention": "gather"}}),
    Variant(
        "e_sparse, tokens weighted",
        {"tokens": "effect", "permute": {"attention": "gather", "rows": "effect"}},
    ),
    Variant(
        "e_sparse, tokens weighted, global off",
        {"tokens": "effect", "permute": {"global": "none", "attention": "gather", "rows": "effect"}},
    ),
    Variant("e_sparse, refined", {"permute": {"refine": _MAKE_UP}}),
    Variant("e_sparse, refined, gather", {"permute": {"refine": _MAKE_UP, "attention": "gather"}}),
    Variant(
        "e_sparse, refined, gather, weighted",
        {"permute": {"refine": _MAKE_UP, "attention": "gather", "rows": "effect"}},
    ),
    Variant(
        "e_sparse, refined, tokens weighted, making up",
        {"tokens": "effect", "permute": {"refine": _MAKE_UP, "attention": "gather", "rows": "effect"}},
    ),
    Variant(
        "e_sparse, refined, gather, no correction",
        {"permute": {"refine": {}, "attention": "gather"}},
    ),
    Variant("e_sparse, assignment for local", {"permute": {"local": None, "assign": 20}}),
    Variant("e_sparse, objective score", {"permute": {"objective": "score"}}),
    Variant("e_sparse, residual shared", {"permute": {"residual": "shared"}}),
    Variant("e_sparse, residual none", {"permute": {"residual": "none"}}),
    Variant("obs, no shuffle", {"permute": _UNPERMUTED, "update": _OBS}),
    Variant("obs", {"update": _OBS}),
    Variant("obs, tokens weighted", {"tokens": "effect", "update": _OBS}),
    Variant("obs, sparsegpt with shuffles", {"update": _SPARSEGPT}),
    Variant("obs, without correction", {"update": {**_OBS, "correct": 0.0}}),
    Variant("obs, without refit", {"update": {**_OBS, "refit": 0}}),
    Variant("obs, without descent", {"update": {**_OBS, "descent": 0}}),
    Variant("obs, fixed mask", {"update": {**_OBS, "mask": "fixed"}}),
    Variant("obs, permuted for obs", {"score": {"method": "obs"}, "update": _OBS}),
    Variant("obs, local 256", {"permute": {"local": {"block": 256}}, "update": _OBS}),
    Variant("obs, refined, gather", {"permute": {"refine": {}, "attention": "gather"}, "update": _OBS}),
    Variant("obs, residual none", {"permute": {"residual": "none"}, "update": _OBS}),
    Variant("recovered, without obs", {"recover": {}}),
    Variant("recovered", {"update": _OBS, "recover": {}}),
    Variant("recovered and distilled", {"update": _OBS, "recover": {"distill": {}}}),
)


def choose(
    base: PruneSection, variants: Sequence[Variant], only: Iterable[str] | None, folder: Path
) -> list[tuple[Variant, PruneSection]]:
    """The variants that `only` names, in its order (default: all), each with its prune section.

    Args:
        folder: where relative paths in their changes start.

    Raises:
        EsparseError: an unknown name, or changes that no prune section takes.
    """
    by_name = {variant.name: variant for variant in variants}
    wanted = list(dict.fromkeys(only)) if only else list(by_name)
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise EsparseError(f"no variant is called {unknown[0]!r}", fix=f"choose from: {'; '.join(by_name)}")
    chosen = [by_name[name] for name in wanted]
    return [(variant, resolve_paths(section(base, variant), folder.resolve())) for variant in chosen]


def load_grid(path: Path) -> tuple[Variant, ...]:
    """Read a grid file; baselines that it does not name come first.

    Raises:
        EsparseError: it is not a mapping of names to changes.
    """
    data = read_yaml(path, "grid", "recipes/grids/quickstart.yaml")
    if not isinstance(data, dict) or not data or not all(isinstance(v, dict) for v in data.values()):
        raise EsparseError(
            "a grid is a mapping of row names to changes of the prune section",
            where=path,
            fix="write, for example,  wanda: { score: { method: wanda } }",
        )
    baselines = [variant for variant in VARIANTS if variant.name in BASELINES and variant.name not in data]
    return (*baselines, *(Variant(str(name), changes) for name, changes in data.items()))


def section(base: PruneSection, variant: Variant) -> PruneSection:
    """The recipe's prune section with E-Sparse, both shuffles and no update, but for what it changes."""
    local = base.permute.local or LocalShuffle()
    reference = {
        "score": {"method": "e_sparse", "information": "entropy"},
        "permute": {
            "global": "deal", "local": local.model_dump(), "assign": 0, "refine": None, "residual": "gather",
            "attention": "fold", "rows": "equal", "objective": "error",
        },
        "update": {"method": "none"},
        "tokens": "equal",
        "recover": None,
    }  # fmt: skip
    plain = _merged(base.model_dump(by_alias=True), reference)
    try:
        return PruneSection.model_validate(_merged(plain, variant.changes))
    except ValidationError as error:
        raise EsparseError(
            describe(error, PruneSection.model_json_schema(by_alias=True)),
            where=f"variant {variant.name!r}",
            fix="write its changes as in a recipe's prune section",
        ) from error


def _merged(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested values with some of them changed."""
    merged = dict(plain)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged


def _flat(changes: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted key; an empty mapping is a value."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
