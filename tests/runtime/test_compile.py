"""The compiled glue: what it changes in inductor is still there to be changed, and is right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from esparse_trt.runtime.compile import inductor, wait_first

LOADS = ["a = tl.load(x)", "b = a + 1"]


def body(kernel: SimpleNamespace) -> list[str]:
    """A kernel as inductor leaves it, which reads before it waits, with its waiting placed by us."""
    code = IndentedBuffer()
    for line in (LOADS[0], kernel.GDC_WAIT, kernel.GDC_LAUNCH, LOADS[1]):
        code.writeline(line)
    wait_first(kernel, code)
    return code.getvalue().splitlines()


@pytest.mark.parametrize("programmatic", [True, False])
def test_a_kernel_that_is_launched_programmatically_waits_first(programmatic: bool) -> None:
    kernel = SimpleNamespace(
        GDC_WAIT=TritonKernel.GDC_WAIT, GDC_LAUNCH=TritonKernel.GDC_LAUNCH,
        _enable_pdl_codegen=lambda: programmatic,
    )  # fmt: skip
    lines = body(kernel)
    if programmatic:
        assert lines == [kernel.GDC_LAUNCH, kernel.GDC_WAIT, *LOADS]
    else:
        assert lines == [LOADS[0], kernel.GDC_WAIT, kernel.GDC_LAUNCH, LOADS[1]]


def test_inductor_still_has_the_step_that_is_replaced() -> None:
    """Without it the runtime is right but slower: kernels are then launched one after the other."""
    original = TritonKernel._filter_pdl
    doubled = torch.compile(lambda x: 2 * x + 1, backend=inductor, dynamic=True)
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 3.0))
    assert TritonKernel._filter_pdl is original
    assert not torch.compiler.config.cache_key_tag
