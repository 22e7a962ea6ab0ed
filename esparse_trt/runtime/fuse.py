"""What is fused in a compiled layer before inductor sees it.

Kernels of ours absorb what would be a small kernel of its own, as long as a launch, before or after them:

- a packed GEMM says in the graph that it reads x in another order (`ops.permute`). Who makes x can write it
  in that order for next to nothing: a norm holds whole rows, and what attention makes of one token is
  scattered anyway. What nobody takes is left to the GEMM;
- the residual addition before a norm goes into the norm;
- the rotary embedding before the attention of one token goes into the attention.

The addition at the end of a layer stays a kernel, as layers are compiled one by one. Of prompts, the
epilogue of down would save a writing and a reading of its output; it is left.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from esparse_trt.runtime import attention, norm, ops  # noqa: F401  the operators

_VIEWS = ("reshape", "contiguous")


def fuse(graph: fx.Graph) -> None:
    """Fuse, in place.

    Args:
        graph: of a layer, as dynamo gives it to a backend.
    """
    operators: Any = torch.ops.esparse
    for permute in _calls_of(graph, operators.permute.default):
        _place(permute, operators)
    for normalise in _calls_of(graph, operators.rms_norm.default):
        h = normalise.args[0]
        if _is_call(h, operator.add) and _alike(*h.args):
            normalise.args = (*h.args, *normalise.args[2:])
    for attend in _calls_of(graph, operators.decode_attention.default):
        query, keys = (_rotation(x) for x in attend.args[:2])
        if query and keys and query[1:] == keys[1:]:
            attend.args = (query[0], keys[0], *attend.args[2:8], *query[1:])


def _place(permute: Any, operators: Any) -> None:
    """Let who makes x, or else who reads it, do the work of a `permute`."""
    x, order, places = permute.args
    maker = _maker(x)
    if _is_call(maker, operators.rms_norm.default):
        maker.args = (*maker.args[:4], order)
    elif _is_call(maker, operators.decode_attention.default):
        maker.args = (*maker.args[:7], places, *maker.args[8:])
    else:
        for gemm in list(permute.users):
            assert _is_call(gemm, operators.sparse_gemm.default)
            gemm.args = (*gemm.args[:4], order, *gemm.args[5:])
    permute.replace_all_uses_with(x)
    permute.graph.erase_node(permute)


def _maker(x: Any) -> Any:
    """The node that computes x for one reader only, views of it aside; None if there are other readers."""
    while len(x.users) == 1:
        if x.op != "call_method" or x.target not in _VIEWS:
            return x
        x = x.args[0]
    return None


def _rotation(y: Any) -> tuple[Any, Any, Any] | None:
    """x, cosine and sine if y = x · cosine + (−x₂, x₁) · sine of x's halves, with the same angles for all."""
    if not _is_call(y, operator.add) or not all(_is_call(term, operator.mul) for term in y.args):
        return None
    (x, cosine), (turned, sine) = (term.args for term in y.args)
    if not _is_call(turned, torch.cat) or not _is_call(turned.args[0][0], operator.neg):
        return None
    minus, first = turned.args[0]
    size = x.meta["example_value"].shape[-1]
    halves = (first, slice(None, size // 2)), (minus.args[0], slice(size // 2, None))
    if not all(_is_call(half, operator.getitem) and half.args == (x, (..., part)) for half, part in halves):
        return None
    angles = (angle.meta["example_value"].shape for angle in (cosine, sine))
    return (x, cosine, sine) if all(tuple(shape) == (1, 1, 1, size) for shape in angles) else None


def _alike(*terms: Any) -> bool:
    """Whether they are tensors of one shape and type."""
    values = [getattr(term, "meta", {}).get("example_value") for term in terms]
    kinds = {(str(value.shape), value.dtype) for value in values if isinstance(value, torch.Tensor)}
    return len(kinds) == 1 and all(isinstance(value, torch.Tensor) for value in values)


def _calls_of(graph: fx.Graph, target: Any) -> list[Any]:
    return list(graph.find_nodes(op="call_function", target=target))


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target
