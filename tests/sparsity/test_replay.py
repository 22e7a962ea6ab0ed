"""Loops over columns give the same when they are replayed as CUDA graphs."""

import pytest
import torch

from esparse_trt.sparsity import descent, sweep
from esparse_trt.sparsity.hessian import damped, factor
from esparse_trt.sparsity.pattern import Pattern, nm_mask
from esparse_trt.sparsity.replay import replay

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_on_a_cpu_it_is_a_call():
    calls = []

    def twice(a, b, *, by):
        calls.append(by)
        return a * by, b

    for _ in range(2):
        got = replay(twice, torch.ones(3), None, by=2)
        assert torch.equal(got[0], torch.full((3,), 2.0)) and got[1] is None
    assert calls == [2, 2]


@gpu
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_graphs_give_what_the_calls_give(pattern, fixed, monkeypatch):
    x, weight = torch.randn(900, 336), torch.randn(70, 336)  # the last block is narrower
    hessian = damped((x.T @ x).cuda(), 0.01)
    weight, (upper, _) = weight.cuda(), factor(hessian, 0)
    mask = nm_mask(weight.abs(), pattern) if fixed else None

    def run():
        swept, kept = sweep.sweep(weight, upper, mask, pattern, block=128)
        return swept, kept, *descent.descend(weight, swept, hessian, pattern, block=128, fixed=mask)

    replayed = [run(), run()]
    for module in (sweep, descent):
        monkeypatch.setattr(module, "replay", lambda function, *t, **constants: function(*t, **constants))
    called = run()
    for results in replayed:
        for got, expected in zip(results, called, strict=True):
            torch.testing.assert_close(got, expected)
