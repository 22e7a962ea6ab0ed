"""Sums of maxima and over winners against their definitions, on every device there is."""

from __future__ import annotations

import pytest
import torch

from esparse_trt.sparsity.maxima import sums_of_maxima, sums_of_winners

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def by_definition(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.maximum(row, b).double().sum(1) for row in a])


SIZES = [(1, 1, 1), (5, 7, 3), (9, 257, 300), (64, 300, 65), (40, 9, 5000)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, others, columns", SIZES)
def test_against_the_definition(device: str, rows: int, others: int, columns: int):
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.rand(n, columns, generator=generator).square().to(device) for n in (rows, others))
    torch.testing.assert_close(sums_of_maxima(a, b).double(), by_definition(a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_whole_numbers_are_exact(device: str):
    a, b = (torch.randint(0, 9, (n, 700), generator=torch.Generator().manual_seed(n)) for n in (33, 270))
    a, b = a.to(device), b.to(device)
    assert torch.equal(sums_of_maxima(a.float(), b.float()).double(), by_definition(a, b))
    assert torch.equal(sums_of_maxima(a.double(), b.double()), by_definition(a, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, others, columns", SIZES)
def test_winners_against_the_definition(device: str, rows: int, others: int, columns: int):
    """Worths of either sign, and many ties, which the first operand wins; whole numbers, so exact."""
    generator = torch.Generator().manual_seed(rows)

    def numbers(count: int, low: int) -> torch.Tensor:
        return torch.randint(low, 5, (count, columns), generator=generator).float().to(device)

    a, worth_a, b, worth_b = numbers(rows, 0), numbers(rows, -5), numbers(others, 0), numbers(others, -5)
    wanted = torch.stack([torch.where(b > x, worth_b, y).sum(1) for x, y in zip(a, worth_a, strict=True)])
    assert torch.equal(sums_of_winners(a, worth_a, b, worth_b), wanted)
