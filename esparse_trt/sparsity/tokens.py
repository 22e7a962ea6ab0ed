"""How much each token of the calibration text counts where a layer's squared output error is measured.

Tokens are not alike: all others attend to the first of a sequence, an attention sink (arXiv 2309.17453), so
an error in its value is an error of every token. A token t counts at a site by c_t = (Σ_i (∂ℓ/∂y_ti)²)^½,
mean 1, with y_ti the outputs of the site's layers in the dense model and ℓ the negative log-likelihood of
next tokens drawn from the model's own distribution. The expected squares are the diagonal of the Fisher
information: small errors e of independent outputs cost KL ≈ ½ Σ_ti (∂ℓ/∂y_ti)² e_ti². The root, which is less
uneven, is our own choice.

The gradient goes through the model block by block too, back to front: what every block reads is kept in host
memory on the way to the loss, for as many sequences at a time as fit in 4 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from esparse_trt.errors import EsparseError
from esparse_trt.progress import track
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.trace import traced, watched

_BATCH = 4  # sequences whose logits exist at a time
_KEPT = 1 << 32  # bytes of what blocks read that are kept


def token_weights(
    model: BlockwiseModel, sites: Mapping[str, Sequence[str]], windows: Tensor
) -> dict[str, Tensor]:
    """c of the module docstring.

    Args:
        model: the dense model; its streams are left alone.
        sites: site -> its layers, which are in blocks.
        windows: int64 token ids [samples, length].

    Returns:
        site -> float32 [samples · length], on the model's device; sites that nothing depends on are left out.

    Raises:
        EsparseError: the model's predictions are not finite.
    """
    own = BlockwiseModel(model.path, model.device, trust_remote_code=model.trust_remote_code)
    width = own.config.get_text_config().hidden_size * own.dtype.itemsize
    batches = max(1, _KEPT // (_BATCH * own.blocks * windows.shape[1] * width))
    draws = torch.Generator(own.device).manual_seed(0)
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for part in windows.split(batches * _BATCH):
        squares = _squares(own, [name for layers in sites.values() for name in layers], part, draws)
        for site, layers in sites.items():
            parts[site].append(torch.stack([squares[name] for name in layers]).sum(0))
    weights = {site: torch.cat(part).sqrt() for site, part in parts.items()}
    return {site: c / c.mean() for site, c in weights.items() if c.any()}


def _squares(
    model: BlockwiseModel, names: Sequence[str], windows: Tensor, draws: torch.Generator
) -> dict[str, Tensor]:
    """Layer -> Σ_i (∂ℓ/∂y_ti)² [T]."""
    model.embed(windows, _BATCH)
    assert model.hidden is not None
    read = []
    for index in range(model.blocks):
        read.append(model.hidden.clone())
        with model.resident(index):
            model.advance(index, model.hidden)
    gradient = torch.cat(_loss_gradient(model, draws))
    squares: dict[str, Tensor] = {}
    for index in track(range(model.blocks - 1, -1, -1), "weighing tokens", total=model.blocks):
        mine = [name for name in names if name.startswith(f"{model.block_name(index)}.")]
        with model.resident(index):
            found = [
                _step_back(model, index, mine, x, g)
                for x, g in zip(read.pop().split(_BATCH), gradient.split(_BATCH), strict=True)
            ]
        squares |= {name: torch.cat([part[name] for part in found]) for name in mine}
    return squares


def _loss_gradient(model: BlockwiseModel, draws: torch.Generator) -> list[Tensor]:
    """∂ℓ/∂h [B, length, hidden] of what the last block puts out, for each batch: float32, in host memory."""
    assert model.hidden is not None
    gradients = []
    with model.loaded_tail() as tail, torch.enable_grad():
        for hidden in model.hidden.split(_BATCH):
            x, logits = traced(model, hidden, tail)
            logits = logits.flatten(0, 1).float()
            if not bool(logits.isfinite().all()):
                raise EsparseError(
                    "NaN or Inf in what the dense model predicts on the calibration text",
                    where="prune.tokens",
                    fix="see whether it overflows in float16 (try a float32 or bfloat16 checkpoint, or "
                    "prune.device: cpu), and whether the checkpoint is sound",
                )
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draws).flatten()
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            gradients.append(torch.autograd.grad(loss, x)[0].cpu())
    return gradients


def _step_back(
    model: BlockwiseModel, index: int, names: Sequence[str], hidden: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Turn the gradient by what a resident block puts out into that by what it reads, in place.

    Args:
        hidden: what the block reads, [B, length, hidden].
        gradient: float32, of the same shape, in host memory.

    Returns:
        layer -> Σ_i (∂ℓ/∂y_ti)² [B · length].
    """
    with watched(model, names) as seen:
        x, y = traced(model, hidden, lambda x: model.forward(index, x))
    below, *slopes = torch.autograd.grad(y, [x, *(output for _, output in seen.values())], gradient.to(y))
    squares = {
        name: slope.flatten(0, -2).float().square().sum(1) for name, slope in zip(seen, slopes, strict=True)
    }
    gradient.copy_(below)  # last: a slope may be the gradient itself, passed on by the residual stream
    return squares
