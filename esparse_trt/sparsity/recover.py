"""Recovery: the kept weights are trained on the calibration text, with the masks frozen.

Block by block: a pruned decoder block reads what the pruned blocks before it put out, and is trained to put
out what the dense block does in the dense model, so that it also makes up for what was lost before it. The
loss is ‖ŷ_t − y_t‖² / ‖y_t‖², mean over tokens t: the norms that follow divide by the token's norm, and a few
tokens with huge norms would otherwise be all that is fitted.

Then, if wanted, the whole model: KL(dense ‖ sparse) of the next-token distributions (distillation).

Trained are the weights of the pruned layers and nothing else, in float32 with AdamW; on a GPU the passes run
in bf16. What is pruned is set to zero after every step, and checked at the end. While a block is trained, the
hidden states in front of it and behind it are on the device, in the checkpoint's dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from esparse_trt.errors import EsparseError
from esparse_trt.model import load_model
from esparse_trt.progress import track
from esparse_trt.records import RecoverRecord
from esparse_trt.sections import DistillSection, RecoverSection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.trace import autocast

_WARM_UP = 0.05
_WINDOW = 10  # steps whose mean loss is reported for the whole model


def recover_block(model: BlockwiseModel, index: int, pruned: Pruned, section: RecoverSection) -> Pruned:
    """Train a resident, pruned block towards what `model.dense` holds, the dense block's outputs.

    The block is left with the trained weights, as the checkpoint will hold them.

    Args:
        pruned: what was decided for this block.

    Returns:
        the new values of the pruned layers.

    Raises:
        EsparseError: the training diverged.
    """
    assert model.hidden is not None and model.dense is not None
    inputs, target = (stream.to(model.device) for stream in (model.hidden, model.dense))
    batch = min(model.batch_size, len(inputs))

    def loss(rows: Tensor) -> Tensor:
        with autocast(model.device):
            output = model.forward(index, inputs[rows].float())
        wanted = target[rows].float()
        return ((output.float() - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()

    def mean_loss() -> float:
        whole = range(0, len(target) - batch + 1, batch)  # full batches, as in training
        with torch.no_grad():
            return sum(float(loss(torch.arange(i, i + batch))) for i in whole) / len(whole)

    with _Trained(model.model, pruned, section.learning_rate, section.steps) as trained:
        before = mean_loss()
        for rows in _batches(len(target), batch, section.steps, seed=index):
            trained.step(loss(rows))
        after = mean_loss()
    values = trained.values(model.stored_dtype, model.block_name(index))
    return Pruned(
        values=values,
        recovered=[RecoverRecord(block=index, steps=section.steps, before=before, after=after)],
    )


def distill(model: BlockwiseModel, pruned: Pruned, windows: Tensor, section: DistillSection) -> Pruned:
    """Train a whole pruned model towards the dense one; both are loaded anew.

    Args:
        model: the dense model.
        pruned: masks and values of all layers.
        windows: int64 token ids [samples, length].

    Returns:
        the new values of all pruned layers.

    Raises:
        EsparseError: the training diverged.
    """
    device = model.device
    dense, sparse = (
        load_model(model.path, dtype, device, trust_remote_code=model.trust_remote_code)
        for dtype in (model.dtype, torch.float32)
    )
    pruned.apply(sparse)
    losses: list[Tensor] = []
    start = time.monotonic()
    with _Trained(sparse, pruned, section.learning_rate, section.steps) as trained:
        batches = _batches(len(windows), min(section.batch_size, len(windows)), section.steps, seed=0)
        for rows in track(batches, "distilling", total=section.steps):
            ids = windows[rows].to(device)
            with torch.no_grad():
                wanted = _log_p(dense, ids)
            with autocast(device):
                found = _log_p(sparse, ids)
            loss = nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
            losses.append(loss.detach())
            trained.step(loss)
            if section.seconds is not None:
                losses[-1].item()  # waits for the step, which nothing else does
                if time.monotonic() - start > section.seconds:
                    break
    means = [torch.stack(part).mean().item() for part in (losses[:_WINDOW], losses[-_WINDOW:])]
    record = RecoverRecord(block=None, steps=len(losses), before=means[0], after=means[1])
    return Pruned(values=trained.values(model.stored_dtype, "the whole model"), recovered=[record])


def _log_p(model: nn.Module, ids: Tensor) -> Tensor:
    """Logarithms of the next-token probabilities after each of these tokens: float32 [tokens, vocabulary]."""
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.flatten(0, -2).log_softmax(-1, dtype=torch.float32)


class _Trained:
    """The weights of pruned layers in float32 with their optimiser; all else of the model is frozen."""

    def __init__(self, model: nn.Module, pruned: Pruned, learning_rate: float, steps: int) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.weights = {name: linear(model, name).weight for name in pruned.masks}
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in pruned.masks.items()}
        self.dtype = next(iter(self.weights.values())).dtype
        for weight in self.weights.values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
            fused=next(iter(self.weights.values())).is_cuda,
        )  # fmt: skip
        warm_up = max(1, round(_WARM_UP * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda t: min((t + 1) / warm_up, (1 + math.cos(math.pi * min(1, t / steps))) / 2),
        )

    def __enter__(self) -> _Trained:
        return self

    def __exit__(self, *_: object) -> None:
        for weight in self.weights.values():
            weight.requires_grad_(False)
            weight.grad = None

    def step(self, loss: Tensor) -> None:
        """One step down the gradient; pruned weights are zero again after it."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(self.masks[name])

    def values(self, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
        """The kept weights as the checkpoint will hold them; the model is left with the same."""
        values = {}
        for name, weight in self.weights.items():
            mask, stored = self.masks[name], weight.data.to(dtype)
            if not bool(stored.isfinite().all()) or bool(stored[~mask].any()):
                raise EsparseError(
                    f"training the kept weights diverged in {name}",
                    where=where,
                    fix="set a lower prune.recover.learning_rate, or leave prune.recover out",
                )
            values[name] = stored[mask].cpu()
            weight.data = stored.to(self.dtype)
        return values


def _batches(samples: int, batch: int, steps: int, *, seed: int) -> Iterator[Tensor]:
    """Row numbers of every step: all samples in a new random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(samples, generator=generator)])
        rows, order = order[:batch], order[batch:]
        yield rows
