"""What the stages report: one typed record each, stored in `build.json`.

A record holds facts only (names, shapes, figures), never tensors.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of the stage records."""

    # An infinite error is a fact too: strict JSON has no literal for it, so it is written as "Infinity".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Reason(str, Enum):
    """Why a layer runs as it does."""

    faster = "faster"  # sparse, at every number of tokens of the traffic
    mixed = "mixed"  # sparse at some of them, dense at others: the time over the whole traffic decides
    dense_faster = "dense_faster"  # at every number of tokens of the traffic
    not_measured = "not_measured"  # it runs sparse: it is smaller, and the library's heuristic has a kernel
    asked = "asked"  # the recipe's engine.sparse_gemm says so
    no_plugin = "no_plugin"  # the Sparse-GEMM plugin cannot be used here
    not_selected = "not_selected"  # the recipe's prune.layers leaves it out
    not_2_4 = "not_2:4"  # its weight has another pattern, or none
    not_eligible_shape = "not_eligible_shape"  # the packed layout cannot hold N x K
    not_eligible_dtype = "not_eligible_dtype"  # or the type
    not_plain = "not_plain"  # its weight is shared, or its node is not a plain linear layer


Kernel = Literal["plugin", "native", "dense"]  # ours; TensorRT's own for 2:4 weights; none for sparse weights


# --- prune ---------------------------------------------------------------------------------------------


class KeptScore(Record):
    """Share of the permutation objective (squared or plain scores) that the N:M mask keeps, in [0, 1]."""

    natural: float = Field(description="original channel order")
    global_: float = Field(description="after the global naive shuffle")
    final: float = Field(description="after the local block shuffle too: what the layer was pruned with")


class UpdateRecord(Record):
    """How the kept weights of one site's layers were re-fitted, all layers that read the tensor together.

    Errors are those of the outputs on the calibration inputs, squared, as a share of the dense outputs';
    tokens count as `prune.tokens` says.
    """

    damping: float = Field(description="share of the Hessian's mean diagonal that it took to factor it")
    masked_error: float = Field(description="with the same mask and the dense model's weights")
    error: float = Field(description="with the re-fitted weights")


class LayerRecord(Record):
    """What happened to one linear layer; `shape` is [N, K] = [out_features, in_features]."""

    name: str = Field(description="module name, such as model.layers.0.mlp.down_proj")
    site: str = Field(
        description="the group of layers that read the same tensor: qkv, o, gate_up, fc1, down ..."
    )
    block: int | None = Field(description="index of the decoder block")
    shape: tuple[int, int]
    pattern: str | None = Field(description="n:m, or null where the layer stayed dense")
    reason: str | None = Field(description="why the layer stayed dense")
    permuted: bool = Field(description="whether permutation.safetensors has an entry for it")
    sparsity: float = Field(description="share of zeros in the stored weight")
    kept: KeptScore | None
    update: UpdateRecord | None = Field(None, description="null where the kept weights are the dense model's")


class ChannelProfile(Record):
    """Per-channel statistics of one site for plots, at most 512 evenly spaced channels, in stored order."""

    site: str = Field(description="such as model.layers.0.mlp.down_proj")
    channels: list[int] = Field(description="original channel indices")
    entropy: list[float] | None = Field(description="nats; null when the score does not use it")
    score: list[float] = Field(description="mean score of the channel over the rows")
    position: list[int] = Field(description="position of each of these channels after the permutation")


class RecoverRecord(Record):
    """What training the kept weights of one block, or of the whole model, gave.

    The loss of a block is the squared error of its outputs against the dense model's, as a share of their
    squared norm, mean over tokens; that of the whole model is KL(dense || sparse) in nats.
    """

    block: int | None = Field(description="null: the whole model")
    steps: int
    before: float = Field(description="loss over the calibration text; of the whole model, over 10 steps")
    after: float


class SiteCost(Record):
    """What pruning the layers that read one tensor costs when everything else is dense."""

    site: str = Field(description="module name of its first layer")
    layers: list[str]
    parameters: int
    kept: float = Field(description="share of the permutation objective that the mask keeps, over its layers")
    nats: float = Field(description="rise of the mean negative log-likelihood on the calibration text")
    nats_4_8: float | None = Field(None, description="the same at 4:8; null where that was not measured")
    gain: float | None = Field(
        None, description="share of the time of all linear layers, dense, that it saves; null without a speed"
    )
    pattern: str | None = Field(description="what the budget makes of it; null: it stays dense")
    reason: str | None = Field(None, description="why it is not pruned to the recipe's pattern")


class LayerChoice(Record):
    """What a budget decided, and what that was estimated to cost and gain."""

    ln_ratio: float = Field(description="ln(sparse / dense perplexity), as estimated")
    speedup: float | None = Field(
        None, description="dense / sparse time of all linear layers in a decode step"
    )
    speed_of: str | None = Field(None, description="what the times are of")
    sites: list[SiteCost] = Field(description="every site that could be pruned, in model order")


class PruneRecord(Record):
    """What the prune stage did, layer by layer."""

    model_type: str
    parameters: int
    pruned_parameters: int = Field(description="parameters of the layers that were pruned, zeros included")
    dtype: str = Field(description="dtype of the checkpoint")
    source_sha256: str = Field(description="over the dense model's files")
    calibration_sha256: str = Field(description="over the calibration token ids (int64, little endian)")
    calibration_tokens: int
    training_sha256: str | None = Field(None, description="SHA-256 over the tokens of recover.distill.text")
    device: str
    layers: list[LayerRecord]
    channels: list[ChannelProfile]
    choice: LayerChoice | None = Field(None, description="of layers, if there is a budget")
    recovered: list[RecoverRecord] = Field([], description="blocks in order, then the whole model")


# --- export, fold, certify -------------------------------------------------------------------------------


class TensorSpec(Record):
    """A graph input or output; symbolic dimensions are strings."""

    name: str
    dtype: str = Field(description="numpy name: float16, int64 ...")
    shape: list[int | str]


class ExportRecord(Record):
    """`dense.onnx` and `explicit.onnx` have the same inputs, outputs and node names."""

    dtype: str
    opset: int
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    linears: dict[str, str] = Field(
        description="module name -> name of its weight initializer, [K, N] or [N, K]"
    )
    gathers: list[str] = Field(description="names of the explicit permutation nodes of explicit.onnx")
    bytes: dict[str, int] = Field(description="dense, explicit: graph plus external data")


class FoldRecord(Record):
    """Which permutations became free, and the proof that nothing changed."""

    folded: int = Field(description="Gather nodes folded into initializers")
    kept: dict[str, str] = Field(description="Gather node -> why it could not be folded")
    logits_error: float = Field(description="relative L2 distance of the logits before and after folding")
    dense_error: float = Field(description="the same for the dense model, permuted and folded but not pruned")
    bytes: int = Field(description="sparse.onnx plus external data")


class PackedGemm(Record):
    """One `SparseGemm` node of `packed.onnx`; `shape` is [N, K] of all its layers together."""

    name: str = Field(description="of the node; <name>.values, <name>.metadata ... hold the weights")
    operator: str = Field(description="variant of the operator: with a bias, with an input permutation")
    layers: list[str] = Field(description="the linear layers in it, in the order of their rows")
    shape: tuple[int, int]
    bytes: int = Field(description="values and metadata")
    dense_bytes: int = Field(description="of the same weights in sparse.onnx")


class StaysDense(Record):
    """Why a linear layer cannot be packed."""

    code: Reason
    reason: str


class PackRecord(Record):
    """What `packed.onnx` runs sparse, and what it does not."""

    layout: str
    gemms: list[PackedGemm]
    dense: dict[str, StaysDense] = Field(description="linear layer -> why it stays as it is")
    permutations: dict[str, str] = Field(description="Gather of sparse.onnx -> the node that does its work")
    logits_error: float | None = Field(
        description="relative L2 distance of the logits to those of sparse.onnx; null if nothing was packed"
    )
    bytes: int = Field(description="packed.onnx plus external data; 0 if nothing could be packed: no file")


class CertifiedTensor(Record):
    """One tensor that was found N:M along K in memory order; `groups` of m weights were looked at."""

    where: str = Field(description="checkpoint, onnx/explicit.onnx or onnx/sparse.onnx")
    name: str
    shape: list[int]
    pattern: str
    groups: int
    sparsity: float


class CertifyRecord(Record):
    """Every tensor that the recipe made sparse, in the checkpoint and in the ONNX file."""

    pattern: str
    tensors: list[CertifiedTensor]
    sha256: dict[str, str] = Field(
        description="file, relative to the build folder -> SHA-256 of what was certified"
    )


# --- engine, report, deploy ------------------------------------------------------------------------------


class PluginRecord(Record):
    """The plugin library that an engine was built with, and needs wherever it is loaded."""

    library: str = Field(description="its path on the machine that built the engine")
    version: str
    layout: str
    kernel_set: str = Field(description="digest of its kernels")
    table: str | None = Field(description="the tuning table that its kernels were chosen by")


class EngineLayer(Record):
    """How one packed GEMM runs in the sparse engine: as a whole, its weights are there once."""

    name: str = Field(description="of the node of packed.onnx")
    kernel: Kernel
    code: Reason
    reason: str = Field(description="the same for people, with the figures")
    speedup: float | None = Field(None, description="over dense, of the time that the recipe's traffic takes")
    dense_faster_at: list[int] = Field(
        default_factory=list, description="measured numbers of tokens at which dense would be faster"
    )
    choices: str | None = Field(
        None, description="largest number of tokens -> kernel; null: the library's heuristic chooses"
    )


class EngineFile(Record):
    """One TensorRT engine on disk."""

    file: str = Field(description="relative to the build folder")
    bytes: int
    seconds: float
    onnx: str = Field(description="the ONNX file it was built from, relative to the build folder")
    onnx_sha256: dict[str, str] = Field(description="file -> SHA-256 at the time of the build")
    sparse_weights: bool
    plugin: PluginRecord | None = None
    layers: list[EngineLayer] = Field(
        default_factory=list, description="of the sparse engine: each packed GEMM"
    )


class EngineRecord(Record):
    """The engines, or the reason why there are none."""

    flavour: Literal["tensorrt", "tensorrt_rtx"] | None
    version: str | None
    skipped: str | None = Field(description="why there are no engines, and what to install")
    dense: EngineFile | None
    sparse: EngineFile | None
    no_plugin: str | None = Field(None, description="why the sparse engine does not use the plugin")
    profiles: dict[str, Any]
    runnable: bool
    not_runnable: str | None = Field(description="why the engines cannot be run on this machine")


class ReportRecord(Record):
    """Where the report lies, relative to the build folder."""

    html: str
    json_file: str


class DeployRecord(Record):
    """The Triton model repository."""

    model_name: str
    text_model: str | None = Field(description="name of the model that takes and returns text")
    backend: str
    reason: str = Field(description="why this backend")
    max_batch_size: int
    files: list[str] = Field(description="relative to the build folder")
    command: str = Field(description="command that serves the repository")
