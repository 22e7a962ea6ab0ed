"""ONNX export, engines, and what they will serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from esparse_trt.sections.base import Section


class ExportSection(Section):
    """ONNX export with KV cache."""

    dtype: Literal["float16", "float32"] = Field("float16", description="Type of weights and activations")
    opset: int = Field(20, ge=18, le=22, description="ONNX opset")


class Profile(Section):
    """An optimisation profile: [minimum, optimum, maximum] of each dynamic dimension."""

    batch: tuple[int, int, int] = (1, 1, 4)
    sequence: tuple[int, int, int]
    past: tuple[int, int, int]

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        for name in ("batch", "sequence", "past"):
            low, best, high = getattr(self, name)
            if not 0 <= low <= best <= high:
                raise ValueError(
                    f"{name} must be [minimum, optimum, maximum] in ascending order, not {[low, best, high]}"
                )
        if self.batch[0] < 1 or self.sequence[0] < 1:
            raise ValueError("batch and sequence start at 1; only past may be 0")
        return self


SparseGemm = Literal["auto", "plugin", "native", "dense"]


class Traffic(Section):
    """Requests that are served together: one prefill of batch · prompt tokens, then `generated` steps."""

    batch: int = Field(1, ge=1, description="Sequences at a time")
    prompt: int = Field(512, ge=1, description="Tokens of each prompt")
    generated: int = Field(128, ge=0, description="Tokens generated after each prompt")
    weight: float = Field(1.0, gt=0, description="How many such batches there are for each of the others")


TRAFFIC = [Traffic(batch=1), Traffic(batch=16)]  # one user, and a moderately loaded server


class EngineSection(Section):
    """TensorRT engines."""

    flavour: Literal["auto", "tensorrt", "tensorrt_rtx", "none"] = Field(
        "auto", description="Which TensorRT builds the engines; auto takes tensorrt, then tensorrt_rtx"
    )
    dense: bool = Field(True, description="Also build the dense engine, to compare with")
    sparse_gemm: SparseGemm = Field(
        "auto",
        description="What multiplies 2:4 layers: auto chooses for each by the tuner's table and the traffic, "
        "plugin runs all that can be packed in the Sparse-GEMM plugin or fails, native leaves them to "
        "TensorRT's own 2:4 kernels (SPARSE_WEIGHTS), dense runs them like any other weight",
    )
    plugin_library: Path | None = Field(
        None, description="libesparse_trt_plugin.so; none: the packaged one, or of the source tree's build"
    )
    table: Path | None = Field(
        None, description="Table of `esparse-trt tune`; none: the one in the user's cache for this GPU"
    )
    profiles: dict[str, Profile] = Field(
        default_factory=lambda: {
            "prefill": Profile(sequence=(1, 512, 2048), past=(0, 0, 0)),
            "decode": Profile(sequence=(1, 1, 1), past=(1, 512, 2048)),
        }
    )
    workspace_mib: int | None = Field(
        None, ge=1, description="Workspace limit in MiB; none: the builder's own"
    )
    compute_capabilities: list[Annotated[str, Field(pattern=r"^\d+\.\d$")]] | None = Field(
        None,
        min_length=1,
        description='TensorRT-RTX only: GPUs to build for, such as ["8.6", "8.9"]; none: all from Ampere on',
    )
    run: Literal["auto", "never"] = Field("auto", description="Run the engines where a GPU can")
