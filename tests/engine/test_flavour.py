"""Which TensorRT is taken, and what is said when none can be."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from esparse_trt.engine import flavour
from esparse_trt.engine.flavour import Choice, Gpu, choose, find_gpu, unusable
from esparse_trt.errors import EsparseError

H100 = Gpu("NVIDIA H100", (9, 0), 79.6, "13.0")
NO_GPU = "no NVIDIA driver: libcuda.so.1 cannot be loaded"


@pytest.fixture
def machine(monkeypatch):
    """Pretend that these flavours are installed, in these versions, and that this GPU is there."""

    def pretend(installed, gpu):
        monkeypatch.setattr(
            flavour, "find_spec", lambda name: SimpleNamespace() if name in installed else None
        )
        modules = {name: SimpleNamespace(__version__=version) for name, version in installed.items()}
        monkeypatch.setattr(flavour.importlib, "import_module", modules.__getitem__)
        monkeypatch.setattr(flavour, "find_gpu", lambda: gpu)

    return pretend


def test_none_is_skipped_because_the_recipe_says_so():
    assert choose("none") == Choice(None, None, "the recipe sets engine.flavour: none")


def test_auto_prefers_tensorrt_proper_where_it_can_build(machine):
    both = {"tensorrt": "10.14.1.48", "tensorrt_rtx": "1.7.1.116"}
    machine(both, H100)
    assert choose("auto") == Choice("tensorrt", "10.14.1.48", None)
    machine(both, NO_GPU)
    assert choose("auto") == Choice("tensorrt_rtx", "1.7.1.116", None)


def test_with_neither_installed_auto_says_what_to_install(machine):
    machine({}, NO_GPU)
    choice = choose("auto")
    assert choice.flavour is None
    assert "esparse-trt[rtx]" in choice.skipped
    assert "esparse-trt[tensorrt]" in choice.skipped


def test_only_tensorrt_proper_without_a_gpu_gives_both_reasons(machine):
    machine({"tensorrt": "11.0.0"}, NO_GPU)
    skipped = choose("auto").skipped
    assert "builds engines only on a machine with a GPU" in skipped
    assert "TensorRT-RTX is not installed" in skipped


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_flavour_asked_for_by_name_must_be_there(machine, name):
    machine({}, H100)
    with pytest.raises(EsparseError, match="is not installed: pip install 'esparse-trt") as error:
        choose(name)
    assert error.value.where == f"engine.flavour: {name}"


def test_old_versions_are_refused(machine):
    machine({"tensorrt": "10.12.0.36"}, H100)
    assert "TensorRT 10.12.0.36 is older than 10.13" in unusable("tensorrt")


def test_a_broken_installation_is_named(machine, monkeypatch):
    machine({"tensorrt_rtx": "1.7.1"}, H100)

    def fail(name):
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(flavour.importlib, "import_module", fail)
    with pytest.raises(EsparseError, match=r"installed but cannot be imported: libtensorrt_rtx\.so\.1"):
        choose("tensorrt_rtx")


class Driver:
    """The part of libcuda that is asked, for `count` H100s."""

    def __init__(self, status=0, count=1):
        self.status, self.count = status, count

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, out):
        out._obj.value = self.count

    def cuDeviceGet(self, out, index):
        out._obj.value = index

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = b"NVIDIA H100 80GB HBM3"

    def cuDeviceTotalMem_v2(self, out, device):
        out._obj.value = 80 * 2**30

    def cuDriverGetVersion(self, out):
        out._obj.value = 13010

    def cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = {75: 9, 76: 0, 16: 132}[attribute]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(), Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80.0, "13.1", 132)),
        (Driver(status=100), "no usable NVIDIA GPU: cuInit returned CUDA error 100"),
        (Driver(count=0), "no NVIDIA GPU is visible (is CUDA_VISIBLE_DEVICES set?)"),
    ],
)
def test_the_gpu_is_asked_for_from_the_driver(monkeypatch, driver, expected):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu.__wrapped__() == expected


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpu.__wrapped__() == NO_GPU


def test_polygraphy_follows_even_if_it_was_imported_before():
    pytest.importorskip("tensorrt_rtx")
    script = """
import os
os.environ.pop("POLYGRAPHY_USE_TENSORRT_RTX", None)
import polygraphy.backend.onnxrt, polygraphy.backend.trt, polygraphy.comparator
from polygraphy.backend.trt import loader
assert not loader.trt.is_installed() or loader.trt.__name__ == "tensorrt"
from esparse_trt.engine.flavour import activate
module = activate("tensorrt_rtx")
from polygraphy.backend.trt import CreateNetwork
builder, network = CreateNetwork(strongly_typed=True)()
assert loader.trt.__version__ == module.__version__
assert isinstance(network, module.INetworkDefinition)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
