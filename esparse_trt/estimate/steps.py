"""What one pass through a decoder takes: the sum of its GEMMs, attention and the rest, block after block.

With B sequences, a prompt of S tokens, a context of C (in decode S + generated / 2, the mean), L blocks, Q
and V channels of queries and of keys (= of values), H of the residual stream and I inside the MLP:

    M           B in decode, B · S in prefill
    gemm        Σ over the blocks' GEMMs of t(N, K, M), from `times.Times`
    head        t(vocabulary, H, B), dense: of every prompt only the last position is asked for
    attention   decode:  2 V · C · B · 2 bytes a block, read at `attention_bandwidth` of the GPU's bandwidth
                prefill: 4 Q · S² / 2 · B operations a block (causal), at `attention_tensor` of its dense peak
    other       `step_us` + L · max(`block_us` − P · `overlap_us`, activations): the small kernels of a block
                are bound by their launches and latency where there are few tokens, by memory where there are
                many. Each of a block's P packed GEMMs is launched programmatically and hides `overlap_us` of
                them behind the arrival of its weights. Activations are 2 bytes · M · (2 norms with residual
                add: 8 H; rotary embedding and cache: 2 Q + 4 V; gated activation: 3 I, none if gate and up
                are a packed GEMM, which applies it to its sums; the order in which a packed GEMM reads the
                output of attention: 2 Q), at `activation_bandwidth` of the bandwidth

Biases and other permutations cost nothing: they are part of the GEMMs, and of the norms before them.
Embedding, final norm and sampling are in `step_us`. Nothing else overlaps. Of the constants (`RUNTIME`)
tests/benchmarks/fit_estimate.py fitted `block_us` and `attention_bandwidth` to the dense models that
`esparse-trt bench` measured on an H100, and `overlap_us` to the decoding of one sparse one, LLaMA-7B; the
others were read from a profile of it. All are taken to be the same on other GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from esparse_trt.estimate.gpus import Gpu
from esparse_trt.estimate.record import CellEstimate, Phase, Step
from esparse_trt.estimate.times import Times
from esparse_trt.layout import Gemm
from esparse_trt.sections import Traffic
from esparse_trt.sparsity.models import Family, family_of, heads_of

WIDTH = 2  # bytes of fp16 and bf16


@dataclass(frozen=True)
class Runtime:
    """What is not a GEMM; see the module's description."""

    block_us: float
    overlap_us: float
    step_us: float
    attention_bandwidth: float
    attention_tensor: float
    activation_bandwidth: float


RUNTIME = Runtime(
    block_us=22.8, overlap_us=2.3, step_us=37.0, attention_bandwidth=0.846, attention_tensor=0.42,
    activation_bandwidth=0.85,
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """How many of a block's GEMMs are packed, in the mean over the blocks.

    Attributes:
        gemms: all of them.
        gated: those of gate and up that apply the activation.
        attended: those that read the output of attention.
    """

    gemms: float = 0.0
    gated: float = 0.0
    attended: float = 0.0

    @classmethod
    def of(cls, gemms: Sequence[tuple[Gemm, bool]], blocks: int, family: Family) -> Packed:
        """Of all blocks' GEMMs, each with whether it runs sparse."""
        gated = {site.name for site in family.sites if site.activation}
        attended = {site.name for site in family.sites if site.reads == "attention"}
        sites = [gemm.site for gemm, sparse in gemms if sparse]
        counts = (sum(site in group for site in sites) for group in (sites, gated, attended))
        return cls(*(count / blocks for count in counts))


@dataclass(frozen=True)
class Dimensions:
    """Channels and counts of a decoder: L, H, Q, V and I of the module's description."""

    blocks: int
    hidden: int
    queries: int
    keys: int
    inner: int

    @classmethod
    def of(cls, config: PretrainedConfig, blocks: int, inner: int) -> Dimensions:
        """From the configuration, the number of blocks and the width of the MLP."""
        heads, kv_heads = heads_of(config, family_of(config))
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(blocks, config.hidden_size, heads * size, kv_heads * size, inner)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of all blocks."""
        return 2 * WIDTH * self.keys * tokens * self.blocks


class Model:
    """One model on one GPU.

    Args:
        dimensions: of the decoder.
        gemms: of all blocks, each with whether it runs sparse.
        head: [N, K] and whether it runs sparse.
        packed: what of a block is packed.
        times: of GEMMs.
        runtime: what is not a GEMM.
    """

    def __init__(
        self,
        dimensions: Dimensions,
        gemms: Sequence[tuple[Gemm, bool]],
        head: tuple[Gemm, bool],
        packed: Packed,
        times: Times,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.dimensions, self.times, self.runtime = dimensions, times, runtime
        self._head, self._packed = head, packed
        self._counts: dict[tuple[tuple[int, int], bool], int] = {}
        for gemm, sparse in gemms:
            key = gemm.shape, sparse
            self._counts[key] = self._counts.get(key, 0) + 1

    @property
    def gpu(self) -> Gpu:
        """It runs on this one."""
        return self.times.gpu

    def cell(self, entry: Traffic, weight_bytes: tuple[int, int]) -> CellEstimate:
        """Prefill and decode of a batch.

        Args:
            entry: the batch.
            weight_bytes: of the whole model, dense and sparse.
        """
        batch, prompt = entry.batch, entry.prompt
        cache = self.dimensions.cache_bytes(batch * (prompt + entry.generated))
        dense, sparse = (weights + cache < self.gpu.memory for weights in weight_bytes)
        context = prompt + entry.generated / 2
        return CellEstimate(
            batch=batch,
            prompt=prompt,
            generated=entry.generated,
            prefill=self._phase(batch * prompt, batch, self._prefill_attention_us(batch, prompt)),
            decode=self._phase(batch, batch, self._decode_attention_us(batch, context)),
            cache_bytes=cache,
            fits={"dense": dense, "sparse": sparse},
        )

    def _phase(self, m: int, batch: int, attention_us: float) -> Phase:
        return Phase(
            dense=self._step(m, batch, attention_us, Packed(), lambda shape, m, _: self._dense_us(shape, m)),
            sparse=self._step(m, batch, attention_us, self._packed, self._chosen_us),
        )

    def _step(
        self,
        m: int,
        batch: int,
        attention_us: float,
        packed: Packed,
        gemm_us: Callable[[tuple[int, int], int, bool], float],
    ) -> Step:
        """Milliseconds; `gemm_us` takes a shape, M and whether the layer runs sparse in the sparse model."""
        gemms = sum(count * gemm_us(shape, m, sparse) for (shape, sparse), count in self._counts.items())
        head, head_sparse = self._head
        return Step(
            gemm=gemms / 1e3,
            head=gemm_us(head.shape, batch, head_sparse) / 1e3,
            attention=attention_us / 1e3,
            other=self._other_us(m, packed) / 1e3,
        )

    def _dense_us(self, shape: tuple[int, int], m: int) -> float:
        return self.times.gemm(*shape, m).dense

    def _chosen_us(self, shape: tuple[int, int], m: int, sparse: bool) -> float:
        pair = self.times.gemm(*shape, m)
        return pair.sparse if sparse else pair.dense

    def _decode_attention_us(self, batch: int, context: float) -> float:
        read = self.dimensions.cache_bytes(1) * context * batch
        return 1e6 * read / (self.runtime.attention_bandwidth * self.gpu.bandwidth)

    def _prefill_attention_us(self, batch: int, prompt: int) -> float:
        operations = 2 * self.dimensions.queries * prompt**2 * batch * self.dimensions.blocks
        return 1e6 * operations / (self.runtime.attention_tensor * self.gpu.dense)

    def _other_us(self, m: int, packed: Packed) -> float:
        size, runtime = self.dimensions, self.runtime
        channels: float = 8 * size.hidden + 2 * size.queries * (1 + packed.attended) + 4 * size.keys
        channels += 3 * size.inner * (1 - packed.gated)
        moved_us = 1e6 * WIDTH * m * channels / (runtime.activation_bandwidth * self.gpu.bandwidth)
        launched_us = runtime.block_us - runtime.overlap_us * packed.gemms
        return runtime.step_us + size.blocks * max(launched_us, moved_us)
