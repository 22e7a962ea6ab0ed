"""Which layers of a build run packed: those that the tuner's table says are faster so under its traffic.

By times of programmatic launches, which is how the runtime launches them and the kernels before them.
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
        launch="programmatic", wish="auto" if wish == "native" else wish,
    )  # fmt: skip
    for layer in chosen:
        if layer.kernel == "dense":
            note(f"{layer.name} stays dense: {layer.reason}", layer=layer.name, code=layer.code.value)
    sparse = {layer.name for layer in chosen if layer.kernel == "plugin"}
    return {layer for gemm in found if gemm.name in sparse for layer in gemm.layers}
