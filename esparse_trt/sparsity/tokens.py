"""How much each token of the calibration text counts for what the model predicts, and for which outputs.

Tokens are not alike: all others attend to the first of a sequence, an attention sink (arXiv 2309.17453), so
an error in its value is an error of every token. Nor do all outputs of a layer matter at the same tokens: one
that makes a sink matters at the first alone. With y_ti the outputs of a layer in the dense model and F_ti the
diagonal of their Fisher information, small errors e of independent outputs cost KL ≈ ½ Σ_ti F_ti e_ti². Two
things are made of it.

A token t counts at a site by c_t = (Σ_i F_ti)^½, mean 1, over the outputs of all its layers. The root, which
is less uneven, is our own choice.

To prune the weight w_ij is to err by w_ij x_tj, at a cost of ½ w_ij² Σ_t F_ti x_tj²: Optimal Brain Damage's
saliency (LeCun et al. 1989), with the Fisher information for a Hessian. Statistics of the site's inputs know
Σ_t c_t x_tj² instead, the same for all outputs. What they lack is the scale

    S_ij² = (Σ_t F_ti x_tj² / Σ_t F_ti) / (Σ_t c_t x_tj² / Σ_t c_t):

how much larger channel j is where output i counts. Scores take S_ij ‖X_j‖ for the norm of channel j, as
GBLM-Pruner (arXiv 2311.04902) scores by gradients; refinement and updates take W ∘ S for W.

Next tokens have the distribution p, and ℓ(z) = ⟨z, logits⟩ for z = √p ∘ s − p ⟨√p, s⟩, with s of independent
signs, has the gradient g by y of which F_ti = E g_ti²: the covariance of z is diag(p) − p pᵀ, the Fisher
information of the logits (Hutchinson 1989; next tokens drawn from p would do too, but vary far more).

The gradient goes through the model block by block too, back to front: what every block reads is kept in host
memory on the way to the logits, for as many sequences at a time as fit in 4 GiB. S is of the first so many,
and kept in float16 in temporary files (where TMPDIR says), which the system holds in memory as far as it can.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError
from esparse_trt.progress import track
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.trace import traced, watched

_BATCH = 4  # sequences that go through a block at a time
KEPT = 1 << 32  # bytes of what blocks read that are kept
_LARGEST = 64.0  # S and 1 / S: more would be what a handful of tokens say


class Weighting(NamedTuple):
    """What counts how much; sites and layers that no prediction depends on are left out."""

    tokens: dict[str, Tensor]  # site -> c [samples · length], float32, on the model's device
    scales: dict[str, Tensor]  # layer -> S [N, K], float16, in temporary files


class _Sums:
    """Sums over the tokens of a part of the text for one site, up to a factor.

    Attributes:
        tokens: Σ_i F_ti [T] over the outputs of all its layers, one batch after another.
        inputs: Σ_t c_t x_tj² [K].
        outputs: layer -> Σ_t F_ti [N].
        products: layer -> Σ_t F_ti x_tj² [N, K].
    """

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.inputs: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}

    def take(self, inputs: Tensor, slopes: Mapping[str, Tensor]) -> None:
        """Take in what the site reads, [..., K], and layer -> g [..., N]."""
        x = inputs.detach().flatten(0, -2).float().square()
        squares = {name: g.flatten(0, -2).float().square() for name, g in slopes.items()}
        tokens = torch.stack([g.sum(1) for g in squares.values()]).sum(0)
        outputs = {name: g.sum(0) for name, g in squares.items()}
        self._add([tokens], tokens.sqrt() @ x, outputs, {name: g.T @ x for name, g in squares.items()})

    def scales(self) -> dict[str, Tensor]:
        """S of the module docstring [N, K] of each layer; 1 where an output or a channel is always 0."""
        if self.inputs is None:
            return {}
        inputs = self.inputs / torch.cat(self.tokens).sqrt().sum()
        scales = {}
        for name, products in self.products.items():
            squares = products / self.outputs[name].unsqueeze(1) / inputs
            scales[name] = squares.nan_to_num_(1.0).sqrt_().clamp_(1 / _LARGEST, _LARGEST)
        return scales

    def _add(
        self, tokens: list[Tensor], inputs: Tensor, outputs: dict[str, Tensor], products: dict[str, Tensor]
    ) -> None:
        self.tokens += tokens
        self.inputs = inputs if self.inputs is None else self.inputs + inputs
        for mine, more in ((self.outputs, outputs), (self.products, products)):
            for name, x in more.items():
                mine[name] = mine[name].add_(x) if name in mine else x


def weight_tokens(model: BlockwiseModel, sites: Mapping[str, Sequence[str]], windows: Tensor) -> Weighting:
    """c and S of the module docstring.

    Args:
        model: the dense model; its streams are left alone.
        sites: site -> its layers, which are in blocks.
        windows: int64 token ids [samples, length].

    Raises:
        EsparseError: the model's predictions are not finite, or there is no space for the temporary files.
    """
    own = BlockwiseModel(model.path, model.device, trust_remote_code=model.trust_remote_code)
    width = own.config.get_text_config().hidden_size * own.dtype.itemsize
    batches = max(1, KEPT // (_BATCH * own.blocks * windows.shape[1] * width))
    signs = torch.Generator(own.device).manual_seed(0)
    squares: dict[str, list[Tensor]] = {site: [] for site in sites}
    scales: dict[str, Tensor] = {}
    for number, part in enumerate(windows.split(batches * _BATCH)):
        for site, found in _go_through(own, sites, part, signs):
            squares[site] += found.tokens
            if number == 0:
                scales |= {name: _in_file(s) for name, s in found.scales().items()}
    roots = {site: torch.cat(found).sqrt() for site, found in squares.items() if found}
    tokens = {site: c / c.mean() for site, c in roots.items() if c.any() and scales.keys() >= {*sites[site]}}
    return Weighting(tokens, {name: scales[name] for site in tokens for name in sites[site]})


def _in_file(values: Tensor) -> Tensor:
    """A float16 copy in a file that has no name any more, so that it goes with the tensor."""
    size = 2 * values.numel()
    try:
        with tempfile.NamedTemporaryFile(prefix="esparse-trt-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            copy = torch.from_file(file.name, shared=True, size=values.numel(), dtype=torch.float16)
    except OSError as error:
        raise EsparseError(
            f"no temporary file of {size / 1e6:.1f} MB can be written: {error.strerror or error}",
            where=tempfile.gettempdir(),
            fix="set TMPDIR to a folder with room for two bytes a pruned weight, or prune.tokens: equal",
        ) from error
    return copy.view_as(values).copy_(values)


def _go_through(
    model: BlockwiseModel,
    sites: Mapping[str, Sequence[str]],
    windows: Tensor,
    signs: torch.Generator,
) -> Iterator[tuple[str, _Sums]]:
    """The sums over a part of the text, site by site, from the last block to the first."""
    model.embed(windows, _BATCH)
    assert model.hidden is not None
    read = []
    for index in range(model.blocks):
        read.append(model.hidden.clone())
        with model.resident(index):
            model.advance(index, model.hidden)
    gradient = torch.cat(_last_gradient(model, signs))
    for index in track(range(model.blocks - 1, -1, -1), "weighting tokens", total=model.blocks):
        prefix = f"{model.block_name(index)}."
        mine = {site: layers for site, layers in sites.items() if site.startswith(prefix)}
        here = {site: _Sums() for site in mine}
        with model.resident(index):
            for x, g in zip(read.pop().split(_BATCH), gradient.split(_BATCH), strict=True):
                _step_back(model, index, mine, x, g, here)
        yield from here.items()


def _last_gradient(model: BlockwiseModel, signs: torch.Generator) -> list[Tensor]:
    """∂ℓ/∂h [1, length, hidden] of what the last block puts out, of every sequence: float32, on the host."""
    assert model.hidden is not None
    gradients = []
    with model.loaded_tail() as tail, torch.enable_grad():
        for hidden in model.hidden.split(1):  # its logits are larger than all else
            x, logits = traced(model, hidden, tail)
            logits = logits.flatten(0, 1).float()
            if not bool(logits.isfinite().all()):
                raise EsparseError(
                    "NaN or Inf in what the dense model predicts on the calibration text",
                    where="prune.tokens",
                    fix="see whether it overflows in float16 (try a float32 or bfloat16 checkpoint, or "
                    "prune.device: cpu), and whether the checkpoint is sound",
                )
            gradients.append(torch.autograd.grad(logits, x, _slopes(logits.detach(), signs))[0].cpu())
    return gradients


def _slopes(logits: Tensor, signs: torch.Generator) -> Tensor:
    """z of the module docstring, [T, vocabulary]."""
    p = logits.softmax(-1)
    z = p.sqrt() * (torch.randint(2, p.shape, generator=signs, device=p.device) * 2 - 1)
    return z.sub_(p * z.sum(-1, keepdim=True))


def _step_back(
    model: BlockwiseModel,
    index: int,
    sites: Mapping[str, Sequence[str]],
    hidden: Tensor,
    gradient: Tensor,
    sums: Mapping[str, _Sums],
) -> None:
    """Turn the gradient by what a resident block puts out into that by what it reads, in place.

    Args:
        sites: of the block, with their layers; their sums are added to.
        hidden: what the block reads, [B, length, hidden].
        gradient: float32, of the same shape, in host memory.
    """
    with watched(model, [name for layers in sites.values() for name in layers]) as seen:
        x, y = traced(model, hidden, lambda x: model.forward(index, x))
    below, *found = torch.autograd.grad(y, [x, *(output for _, output in seen.values())], gradient.to(y))
    slopes = dict(zip(seen, found, strict=True))
    for site, layers in sites.items():
        if called := [name for name in layers if name in seen]:
            sums[site].take(seen[called[0]][0], {name: slopes[name] for name in called})
    gradient.copy_(below)  # last: a slope may be the gradient itself, passed on by the residual stream
