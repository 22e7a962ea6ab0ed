"""Which layers of a build run packed: those that the tuner's table says are faster so under its traffic.

By times of plain launches: ours are programmatic, but the small kernels before them do not let them begin
early, and measured steps of whole models fit the plain times (`estimate.predict.LAUNCH`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from esparse_trt.engine.choice import Layer, choose
from esparse_trt.engine.table import Table
from esparse_trt.layout import gemms
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe


def packed_layers(
    model: PreTrainedModel, packable: Collection[str], recipe: Recipe, table: Table | None, dtype: torch.dtype
) -> set[str]:
    """The linear layers to pack. `engine.sparse_gemm: native` is for TensorRT, and auto here.

    Args:
        model: the model, whose shapes count.
        packable: linear layers that are 2:4.
        recipe: of the build.
        table: of this GPU, if there is one.
        dtype: of the weights.
    """
    name = str(dtype).removeprefix("torch.")
    known = gemms(model.config, model, recipe.prune, name)
    found = [gemm for gemm in known if gemm.stays is None and set(gemm.layers) <= set(packable)]
    wish = recipe.engine.sparse_gemm
    chosen = choose(
        [Layer(gemm.name, gemm.shape) for gemm in found], table, recipe.traffic, dtype=name,
        wish="auto" if wish == "native" else wish,
    )  # fmt: skip
    for layer in chosen:
        if layer.kernel == "dense":
            note(f"{layer.name} stays dense: {layer.reason}", layer=layer.name, code=layer.code.value)
    sparse = {layer.name for layer in chosen if layer.kernel == "plugin"}
    return {layer for gemm in found if gemm.name in sparse for layer in gemm.layers}
