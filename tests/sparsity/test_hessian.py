import pytest
import torch

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.hessian import curvature, factor


def gram(tokens, channels, seed=0):
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


def damped(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("damping", [0, 0.01, 0.5])
def test_the_factor_of_the_inverse(damping):
    hessian = gram(40, 12)
    upper, used = factor(hessian, damping)
    assert used == damping and torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper, damped(hessian, damping).inverse())


@pytest.mark.parametrize("j", range(5))
def test_rows_of_the_factor_belong_to_the_channels_still_free(j):
    """Uᵀ U of the rows and columns from j on is the inverse over those channels alone."""
    hessian = gram(40, 6)
    upper, _ = factor(hessian, 0)
    torch.testing.assert_close(upper[j:, j:].T @ upper[j:, j:], hessian[j:, j:].inverse())


def test_curvature():
    hessian = gram(40, 12)
    expected = 1 / damped(hessian, 0.1).inverse().diagonal()
    torch.testing.assert_close(curvature(hessian, 0.1), expected)


def test_a_singular_hessian_raises_the_damping_until_it_can_be_factored():
    hessian = gram(5, 12).float()  # fewer tokens than channels
    hessian[3], hessian[:, 3] = 0, 0  # a dead channel
    upper, used = factor(hessian, 0)
    assert 0 < used <= 1e-3 and upper.isfinite().all()
    assert factor(hessian, 0.01)[1] == 0.01


def test_inputs_that_are_all_zero():
    upper, used = factor(torch.zeros(4, 4), 0.01)
    torch.testing.assert_close(upper, 10 * torch.eye(4))
    assert used == 0.01


@pytest.mark.parametrize("value", [float("nan"), -1e9])
def test_not_a_hessian(value):
    hessian = gram(40, 4)
    hessian[2, 2] = value
    with pytest.raises(EsparseError, match="not positive semidefinite") as error:
        factor(hessian, 0.01, "model.layers.0.mlp.down_proj")
    assert error.value.where == "model.layers.0.mlp.down_proj"
