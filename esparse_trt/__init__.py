"""esparse-trt: N:M sparse language models with E-Sparse, from PyTorch to ONNX, TensorRT and Triton.

`build(recipe)` does the whole job; the stages are functions of their own (`esparse_trt.sparsity.prune.prune`,
`esparse_trt.graph.export.export`, ...), listed in order in `esparse_trt.pipeline.STAGES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esparse_trt.errors import CheckFailed, EsparseError

if TYPE_CHECKING:
    from esparse_trt.pipeline import build
    from esparse_trt.recipe import Recipe, load_recipe

__all__ = ["CheckFailed", "EsparseError", "Recipe", "build", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Load `build` and friends on first use: `esparse-trt --help` need not wait for torch."""
    if name == "build":
        from esparse_trt.pipeline import build

        return build
    if name in ("Recipe", "load_recipe"):
        from esparse_trt import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'esparse_trt' has no attribute {name!r}")
