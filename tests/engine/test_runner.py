"""The choice of the profile, and running where there is no GPU."""

import subprocess
import sys

import pytest

from esparse_trt.engine import flavour
from esparse_trt.engine.runner import EngineRunner, choose_profile
from esparse_trt.errors import EsparseError


def profile(batch, sequence, past):
    """Ranges of two inputs, as an engine reports them."""
    corners = list(zip(batch, sequence, past, strict=True))
    return {
        "input_ids": tuple((b, s) for b, s, p in corners),
        "past.key": tuple((b, 2, p, 8) for b, s, p in corners),
    }


def shapes(batch, sequence, past):
    return {"input_ids": (batch, sequence), "past.key": (batch, 2, past, 8)}


PREFILL = profile((1, 1, 4), (1, 64, 512), (0, 0, 0))
DECODE = profile((1, 1, 4), (1, 1, 1), (1, 64, 512))
ANY = profile((1, 1, 4), (1, 64, 512), (0, 64, 512))


@pytest.mark.parametrize(
    ("given", "index"),
    [
        (shapes(1, 1, 0), 0),
        (shapes(4, 512, 0), 0),
        (shapes(1, 1, 1), 1),
        (shapes(4, 1, 512), 1),
        (shapes(2, 3, 5), None),  # several new tokens on a cache: neither prefill nor decode
        (shapes(5, 1, 1), None),
        (shapes(1, 1, 513), None),
    ],
)
def test_the_profile_that_holds_the_shapes(given, index):
    assert choose_profile(given, [PREFILL, DECODE]) == index


def test_the_tightest_profile_wins_whatever_its_position():
    assert choose_profile(shapes(1, 1, 7), [ANY, DECODE]) == 1
    assert choose_profile(shapes(1, 1, 7), [DECODE, ANY]) == 0
    assert choose_profile(shapes(1, 2, 7), [DECODE, ANY]) == 1


def test_a_wrong_rank_fits_no_profile():
    assert choose_profile({"input_ids": (1,), "past.key": (1, 2, 0, 8)}, [PREFILL]) is None


def test_without_a_gpu_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(flavour, "find_gpu", lambda: "no NVIDIA driver: libcuda.so.1 cannot be loaded")
    with pytest.raises(EsparseError, match=r"libcuda\.so\.1") as error:
        EngineRunner(tmp_path / "sparse.plan", "tensorrt_rtx")
    assert error.value.where == str(tmp_path / "sparse.plan")


def test_the_runner_can_be_carried_to_a_machine_with_little_installed():
    script = """
import sys
import esparse_trt.engine.runner
heavy = {"torch", "transformers", "onnx", "onnxruntime", "pydantic", "rich", "yaml"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
