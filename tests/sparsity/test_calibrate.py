import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.calibrate import collect

BINS = 32


def run_over(layer, batches):
    def run():
        for number, x in enumerate(batches):
            layer(x)
            yield number

    return run


def statistics(x, batches=None, bins=BINS):
    layer = nn.Linear(x.shape[-1], 2)
    return collect({"site": layer}, run_over(layer, batches or [x]), bins=bins)["site"]


def test_constant_channel_has_entropy_zero():
    x = torch.randn(1, 50, 4)
    x[..., 1], x[..., 2] = 3.25, 0.0
    entropy = statistics(x).information
    assert entropy[1] == 0 and entropy[2] == 0 and (entropy[[0, 3]] > 1).all()


def test_uniform_has_more_entropy_than_peaked():
    uniform = torch.linspace(-1, 1, 3200)
    normal = torch.randn(3200)
    peaked = normal**9
    entropy = statistics(torch.stack([uniform, normal, peaked], dim=1).unsqueeze(0)).information
    assert entropy[0] > entropy[1] > entropy[2]
    assert float(entropy[0]) == pytest.approx(math.log(BINS), abs=1e-3), "the most there is"


def test_against_all_inputs_at_once():
    x = torch.randn(6, 40, 5).double().float()
    got = statistics(x, list(x.split(1)))
    flat = x.flatten(0, 1)
    torch.testing.assert_close(got.norm, flat.double().norm(dim=0))
    for channel in range(5):
        low, high = float(flat[:, channel].min()), float(flat[:, channel].max())
        p = torch.histc(flat[:, channel], BINS, low, high).double() / len(flat)
        torch.testing.assert_close(got.information[channel], torch.special.entr(p).sum(), rtol=1e-2, atol=0)
    assert got.tokens == 240


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_independent_of_the_batches(sizes, seed):
    x = torch.randn(sum(sizes), 7, 3, generator=torch.Generator().manual_seed(seed))
    whole, split = statistics(x), statistics(x, list(x.split(sizes)))
    assert torch.equal(whole.information, split.information)
    torch.testing.assert_close(whole.norm, split.norm, rtol=1e-12, atol=0)


def measured(x, measure, layer=None, bins=BINS):
    layer = layer or nn.Linear(x.shape[-1], 2)
    return collect({"site": layer}, run_over(layer, [x]), bins=bins, measure=measure)["site"].information


def test_differential_entropy_of_a_gaussian_is_its_deviation():
    x = torch.randn(1, 200_000, 3) * torch.tensor([0.1, 1.0, 30.0])
    got = measured(x, "differential", bins=256)
    torch.testing.assert_close(got.float(), torch.tensor([0.1, 1.0, 30.0]), rtol=0.02, atol=0)


def test_divergence_from_a_gaussian():
    """0 for a Gaussian of any scale; of a uniform distribution ½ ln (2πe / 12)."""
    normal, uniform = torch.randn(2, 1, 200_000, 1), torch.rand(1, 200_000, 1)
    got = measured(torch.cat([normal[0], 7 * normal[1] + 3, uniform], dim=-1), "kl", bins=256)
    expected = torch.tensor([0, 0, math.log(2 * math.pi * math.e / 12) / 2])
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.01)


def test_mutual_information_with_the_norm_of_the_output():
    x = torch.rand(1, 50_000, 2)
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0], [2, 0], [0, 0]])  # the output is channel 0, scaled
    got = measured(x, "mutual", layer)
    assert float(got[0]) == pytest.approx(math.log(16), abs=0.01), "it tells the norm's bin"
    assert float(got[1]) < 0.01, "it tells nothing"


@pytest.mark.parametrize("measure", ["entropy", "differential", "kl", "mutual"])
def test_a_constant_channel_carries_no_information(measure):
    x = torch.randn(1, 50, 4)
    x[..., 1], x[..., 2] = 3.25, 0.0
    got = measured(x, measure)
    assert got.isfinite().all() and (got >= 0).all()
    assert got[1] == 0 and got[2] == 0 and (got[[0, 3]] > 0).all()


def test_the_hessian():
    x = torch.randn(6, 40, 5)
    layer, flat = nn.Linear(5, 2), x.flatten(0, 1)
    found = collect({"site": layer}, run_over(layer, list(x.split([1, 3, 2]))), bins=None, hessian=True)
    torch.testing.assert_close(found["site"].hessian, flat.T @ flat)
    assert statistics(x).hessian is None


def test_weighted_tokens():
    torch.manual_seed(0)
    layer, x, c = nn.Linear(8, 4), torch.randn(6, 5, 8), torch.rand(30)
    batches = run_over(layer, list(x.split([1, 3, 2])))
    found = collect({"site": layer}, batches, bins=None, hessian=True, weights={"site": c})["site"]
    rows = x.flatten(0, 1)
    torch.testing.assert_close(found.hessian, rows.T @ (c[:, None] * rows))
    torch.testing.assert_close(found.norm, (c[:, None] * rows.square()).double().sum(0).sqrt())


def test_large_inputs_are_binned_in_pieces(monkeypatch):
    x = torch.randn(4, 30, 6)
    whole = statistics(x)
    monkeypatch.setattr("esparse_trt.sparsity.calibrate._CHUNK_ELEMENTS", 50)
    assert torch.equal(statistics(x).information, whole.information)


def test_without_entropy_one_pass_is_enough():
    x, passes = torch.randn(2, 8, 4), []
    layer = nn.Linear(4, 2)

    def run():
        passes.append(1)
        yield from run_over(layer, [x])()

    got = collect({"site": layer}, run, bins=None)["site"]
    assert got.information is None and len(passes) == 1
    collect({"site": layer}, run, bins=8)
    assert len(passes) == 3


@pytest.mark.parametrize("bins", [None, BINS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_names_layer_and_batch(bins, bad):
    batches = [torch.randn(2, 8, 4) for _ in range(3)]
    batches[1][0, 3, 2] = bad
    with pytest.raises(EsparseError, match=r"NaN or Inf.*batch 1") as error:
        statistics(batches[0], batches, bins)
    assert error.value.where == "site"


def test_a_layer_that_is_never_called():
    layer, other = nn.Linear(4, 2), nn.Linear(4, 2)
    with pytest.raises(EsparseError, match="never called") as error:
        collect({"used": layer, "unused": other}, run_over(layer, [torch.randn(1, 8, 4)]), bins=BINS)
    assert error.value.where == "unused"


def test_hooks_are_removed():
    layer = nn.Linear(4, 2)
    collect({"site": layer}, run_over(layer, [torch.randn(1, 8, 4)]), bins=None)
    assert not layer._forward_pre_hooks and not layer._forward_hooks
