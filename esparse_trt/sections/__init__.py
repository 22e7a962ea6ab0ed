"""The sections of a recipe, one per stage, with their defaults; `recipe.py` puts them together."""

from esparse_trt.sections.base import Section
from esparse_trt.sections.engine import TRAFFIC, EngineSection, ExportSection, Profile, SparseGemm, Traffic
from esparse_trt.sections.prune import (
    BudgetSection,
    DistillSection,
    LayerSelection,
    LocalShuffle,
    PermuteSection,
    PruneSection,
    RecoverSection,
    RefineShuffle,
    ScoreSection,
    UpdateSection,
)
from esparse_trt.sections.text import (
    BUILDERS,
    CalibrationSection,
    EvaluationSource,
    ModelSection,
    TextDataset,
    TextFile,
    TextSelf,
    TextSource,
)
from esparse_trt.sections.verify import DeploySection, ReportSection, VerifySection, ZeroShotSection

__all__ = [
    "BUILDERS",
    "TRAFFIC",
    "BudgetSection",
    "CalibrationSection",
    "DeploySection",
    "DistillSection",
    "EngineSection",
    "EvaluationSource",
    "ExportSection",
    "LayerSelection",
    "LocalShuffle",
    "ModelSection",
    "PermuteSection",
    "Profile",
    "PruneSection",
    "RecoverSection",
    "RefineShuffle",
    "ReportSection",
    "ScoreSection",
    "Section",
    "SparseGemm",
    "TextDataset",
    "TextFile",
    "TextSelf",
    "TextSource",
    "Traffic",
    "UpdateSection",
    "VerifySection",
    "ZeroShotSection",
]
