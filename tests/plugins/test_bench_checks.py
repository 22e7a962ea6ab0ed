"""What the benchmark accepts: right products, and no time below that of reading the weights."""

import importlib
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "plugins" / "bench"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("checks")


def cell(us=10.0, peer_us=10.0, **errors):
    fine = {"ours": 1e-4, "cusparselt": 1e-4, "cusparselt_weights": 0.0, "ours_pdl": 0.0}
    timed = {kind: {"key": "kernel", "us": us} for kind in ("ours", "ours_pdl")}
    timed["cusparselt"] = {"key": 32, "us": peer_us}
    return {"dtype": "float16", "read_us": 9.0, "errors": fine | errors, **timed}


@pytest.mark.parametrize(
    ("found", "accepted", "said"),
    [
        (cell(), True, ""),
        (cell(ours=0.1), False, "ours, kernel, is off by 1.0e-01"),
        (cell(ours_pdl=float("nan")), False, "ours_pdl, kernel, is off by nan"),
        (cell(us=8.0), False, "ours, kernel, takes 8.00 us, reading memory alone 9.00 us"),
        (cell(cusparselt_weights=1.0), True, "cusparselt_weights, 32, is off by 1.0e+00"),
        (cell(peer_us=7.3), True, "cusparselt, 32, takes 7.30 us, reading memory alone 9.00 us"),
    ],
)
def test_a_cell_is_kept_if_ours_is_right_and_what_is_wrong_is_said(checks, capsys, found, accepted, said):
    assert checks.right(found) == accepted
    printed = capsys.readouterr().err
    assert said in printed
    assert bool(printed) == bool(said)


class OfPlans:
    """A peer whose plans multiply by the weights of each call, or by those that they saw first."""

    copies = 1

    def __init__(self, operands, remembers):
        self.operands, self.remembers = operands, remembers

    def run(self, copy, turn, plan=None):
        x, y = self.operands.at(turn, 4)
        plan = copy if plan is None else plan
        y.copy_(x * (1 + (plan if self.remembers else copy)))


class Buffers:
    """Two buffers of 4 x 8 that take turns."""

    sparse = dense = (None,)

    def __init__(self):
        self.start = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
        self.buffers = self.start.clone(), self.start.clone()

    def at(self, turn, m):
        return self.buffers[turn][:m], self.buffers[1 - turn][:m]

    def reset(self, m):
        self.buffers[0].copy_(self.start)


@pytest.mark.parametrize("remembers", [True, False])
def test_a_plan_that_keeps_to_its_first_weights_is_noticed(checks, remembers):
    operands = Buffers()
    assert checks.remembers(operands, 4, OfPlans(operands, remembers)) == remembers
