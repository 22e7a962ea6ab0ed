"""Block coordinate descent over the groups: mask and values of one group at a time, all others fixed.

The error of a row is f(v) = (w − v) H (w − v)ᵀ, H damped. With all but the group g fixed, r = (w − v) H and
b = r_g + v_g H_gg, keeping the channels S of the group with their best values v_S = b_S (H_SS)⁻¹ lowers f by
v_S b_Sᵀ compared with keeping none. All C(m, n) masks are tried, so a pass never raises f, and what the sweep
could not see, errors right of a group, is made up for too. Changes within a block of groups are handed on to
r by one product. This pass and its place after SparseGPT's sweep are our own.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.replay import replay

_MOST_CHOICES = 256  # masks of a group that are tried one by one: all patterns up to 4:8, and 2:16
_CANDIDATES = 1 << 26  # values of a group (rows times masks times m) that exist at a time


def descend(
    dense: Tensor, start: Tensor, hessian: Tensor, pattern: Pattern, *, block: int, fixed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pass over all groups.

    Args:
        dense: [N, K].
        start: [N, K], what to improve.
        hessian: [K, K], damped.
        block: columns, a multiple of m, whose changes are handed on at a time.
        fixed: bool [N, K], the mask to keep to; None: it may change.

    Returns:
        the new weight [N, K], zero where pruned, and what it keeps, bool [N, K].

    Raises:
        EsparseError: a group has too many masks to try.
    """
    masks, inverses = _masks(hessian, pattern)
    height = max(1, _CANDIDATES // masks.numel())
    rows = [slice(top, top + height) for top in range(0, len(start), height)]
    parts = [
        _descend(dense[r], start[r], hessian, masks, inverses, block, None if fixed is None else fixed[r])
        for r in rows
    ]
    weight, kept = (torch.cat(part) for part in zip(*parts, strict=True))
    return weight, kept


def _descend(
    dense: Tensor,
    start: Tensor,
    hessian: Tensor,
    masks: Tensor,
    inverses: Tensor,
    block: int,
    fixed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`descend`, of rows whose candidates fit in memory."""
    weight, kept = start.clone(), torch.empty_like(start, dtype=torch.bool)
    size = masks.shape[1]
    tiles = _tiles(hessian, size)
    residual = (dense - start) @ hessian
    wanted = residual + torch.einsum("ngi,gij->ngj", start.unflatten(1, (-1, size)), tiles).flatten(1)
    for left in range(0, weight.shape[1], block):
        now, right = slice(left, left + block), slice(left + block, None)
        inverse = inverses[left // size : (left + block) // size]
        fix = None if fixed is None else _number(fixed[:, now], masks)
        (choice, new) = replay(_groups, weight[:, now], wanted[:, now], hessian[now, now], inverse, fix)
        kept[:, now] = masks[choice].flatten(1)
        wanted[:, right] -= (new - weight[:, now]) @ hessian[now, right]
        weight[:, now] = new
    return weight.mul_(kept), kept


def _groups(
    weight: Tensor, wanted: Tensor, hessian: Tensor, inverses: Tensor, fixed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block, group by group: the number of the mask, int64 [N, B/m], and the new weight [N, B].

    Args:
        weight: [N, B].
        wanted: b of the module docstring, before anything in the block changes, [N, B].
        hessian: [B, B], the block's tile.
        inverses: as `_masks` gives them, of the block's groups.
        fixed: int64 [N, B/m], the mask to take; None: the best.
    """
    groups, size, _ = inverses.shape
    choices = weight.new_empty(len(weight), groups, dtype=torch.int64) if fixed is None else fixed
    change = torch.zeros_like(weight)
    for index in range(groups):
        left = index * size
        group = slice(left, left + size)
        b = torch.addmm(wanted[:, group], change[:, :left], hessian[:left, group], alpha=-1)
        values = (b @ inverses[index]).unflatten(1, (-1, size))  # [N, C, m]
        if fixed is None:
            torch.argmax((values * b.unsqueeze(1)).sum(2), 1, out=choices[:, index])
        chosen = choices[:, index].view(-1, 1, 1).expand(-1, 1, size)
        torch.sub(values.gather(1, chosen).squeeze(1), weight[:, group], out=change[:, group])
    return choices, weight + change


def _tiles(hessian: Tensor, size: int) -> Tensor:
    """The diagonal tiles H_gg [G, m, m]."""
    tiles = hessian.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _masks(hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """All masks of a group, bool [C, m], and (H_SS)⁻¹ of each group and mask side by side [G, m, C·m].

    What is outside of S is 0.
    """
    count = math.comb(pattern.group, pattern.kept)
    if count > _MOST_CHOICES:
        raise EsparseError(
            f"a group of {pattern} has {count} masks, too many to try each",
            where="prune.update.descent",
            fix="set it to 0, or choose a pattern with smaller groups",
        )
    chosen = torch.tensor(list(combinations(range(pattern.group), pattern.kept)), device=hessian.device)
    masks = torch.zeros(count, pattern.group, dtype=torch.bool, device=hessian.device)
    masks.scatter_(1, chosen, True)
    both = masks.unsqueeze(1) & masks.unsqueeze(2)
    eye = torch.eye(pattern.group, dtype=hessian.dtype, device=hessian.device)
    tiles = _tiles(hessian, pattern.group).unsqueeze(1)
    inverses = torch.linalg.inv_ex(torch.where(both, tiles, eye))[0] * both  # [G, C, m, m]
    return masks, inverses.transpose(1, 2).flatten(2)


def _number(mask: Tensor, masks: Tensor) -> Tensor:
    """Which of the masks the groups of [N, B] have, int64 [N, B/m]: those that agree in the most channels."""
    return (mask.unflatten(1, (-1, masks.shape[1])).float() @ masks.float().T).argmax(2)
