"""The recipe: one typed section per stage, read from YAML.

Every section has defaults, so the shortest recipe names a model and a calibration text. Unknown keys are
errors that name the nearest valid key. Relative paths are relative to the recipe file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from esparse_trt.errors import EsparseError
from esparse_trt.recipe_errors import describe
from esparse_trt.recipe_file import read_yaml
from esparse_trt.sections import (
    BUILDERS,
    TRAFFIC,
    CalibrationSection,
    DeploySection,
    EngineSection,
    ExportSection,
    ModelSection,
    PruneSection,
    ReportSection,
    Section,
    TextDataset,
    Traffic,
    VerifySection,
)


class Recipe(Section):
    """A whole recipe."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the build; default: the file's name"
    )
    description: str = Field("", description="One line for people")
    model: ModelSection
    calibration: CalibrationSection
    prune: PruneSection = Field(default_factory=PruneSection)
    export: ExportSection = Field(default_factory=ExportSection)
    traffic: list[Traffic] = Field(
        default_factory=lambda: list(TRAFFIC),
        min_length=1,
        description="What the model will serve: decides which layers run sparse, and what `estimate` shows",
    )
    engine: EngineSection = Field(default_factory=EngineSection)
    verify: VerifySection = Field(default_factory=VerifySection)
    report: ReportSection = Field(default_factory=ReportSection)
    deploy: DeploySection = Field(default_factory=DeploySection)

    def canonical(self) -> dict[str, Any]:
        """The recipe as plain JSON values with every default filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """SHA-256 over the canonical form."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------


def load_recipe(path: Path | str) -> Recipe:
    """Read and check a recipe file.

    Raises:
        EsparseError: the file is missing, is not YAML, or does not fit the schema; names file, key, the
            actual value and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise EsparseError(
            f"a recipe is a mapping of sections, this file holds {found}",
            where=path,
            fix="start from recipes/quickstart.yaml",
        )
    data.setdefault("name", path.stem)
    return parse_recipe(data, base=path.parent, where=path)


def parse_recipe(data: dict[str, Any], *, base: Path, where: Path | str = "recipe") -> Recipe:
    """Check a recipe given as plain values; relative paths are taken from `base`."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise EsparseError(
            describe(error, Recipe.model_json_schema(by_alias=True)),
            where=where,
            fix="correct the recipe; `esparse-trt recipe schema` prints every key with its type",
        ) from error
    return resolve_paths(recipe, base.resolve())


def resolve_paths(section: Any, base: Path) -> Any:
    """A copy of the section with relative paths made absolute from `base`."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changes[name] = base / value.expanduser()
        elif isinstance(value, Section):
            changes[name] = resolve_paths(value, base)
    if isinstance(section, TextDataset) and section.name in BUILDERS and section.data_files:
        changes["data_files"] = [f if "://" in f else str(base / f) for f in section.data_files]
    return section.model_copy(update=changes) if changes else section
