"""The plugin library: finding, checking and registering it, and what is wrong with wrong ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esparse_trt.engine import libraries, plugin
from esparse_trt.engine.plugin import Plugin, find, inspect, unfit
from esparse_trt.errors import EsparseError

try:
    import tensorrt_rtx as rtx
except ImportError:
    rtx = None

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")

FAKE = """
struct about { int tensorrt_major; const char *version, *layout, *kernel_set; };
const struct about *esparse_about_plugin(void) {
  static const struct about it = {10, VERSION, LAYOUT, "0123456789ab"};
  return &it;
}
"""


def compile_library(path: Path, source: str, **macros: str) -> Path:
    path.with_suffix(".c").write_text(source)
    flags = [f'-D{name}="{value}"' for name, value in macros.items()]
    subprocess.run([COMPILER, "-shared", "-fPIC", *flags, "-o", path, path.with_suffix(".c")], check=True)
    return path


def built_library() -> Path:
    try:
        return libraries.find_library(libraries.PLUGIN)
    except EsparseError as error:
        pytest.skip(error.what)


@needs_compiler
def test_a_library_says_what_it_is(tmp_path):
    path = compile_library(tmp_path / "libfake.so", FAKE, VERSION="0.1.0", LAYOUT="es24-v1")
    assert inspect(path) == Plugin(path, "0.1.0", "es24-v1", "0123456789ab", 10)


@needs_compiler
@pytest.mark.parametrize(
    ("version", "layout", "what"),
    [
        ("99.0", "es24-v1", r"the library is of version 99\.0, esparse-trt is "),
        ("0.1.0", "es24-v9", r"in the layout es24-v9, esparse-trt writes es24-v1"),
    ],
)
def test_a_library_of_another_version_is_refused(tmp_path, monkeypatch, version, layout, what):
    monkeypatch.setattr(plugin.metadata, "version", lambda name: "0.1.0")
    path = compile_library(tmp_path / "libfake.so", FAKE, VERSION=version, LAYOUT=layout)
    with pytest.raises(EsparseError, match=what) as error:
        find(path)
    assert error.value.where == str(path)
    assert "cmake" in error.value.fix


@needs_compiler
def test_another_library_is_no_plugin(tmp_path):
    path = compile_library(tmp_path / "libother.so", "int other;")
    with pytest.raises(EsparseError, match="no function esparse_about_plugin"):
        find(path)


def test_a_file_that_is_no_library_is_named_with_the_loader_s_words(tmp_path):
    path = tmp_path / "libtext.so"
    path.write_text("not a library")
    with pytest.raises(EsparseError, match=r"cannot be loaded: .*libtext\.so"):
        find(path)


def test_a_missing_library_is_named_with_the_folders(tmp_path, monkeypatch):
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    with pytest.raises(EsparseError, match=rf"{libraries.PLUGIN} was not found in {tmp_path}") as error:
        find()
    assert libraries.VARIABLE in error.value.fix


@pytest.mark.parametrize(
    ("flavour", "version", "reason"),
    [
        ("tensorrt", "10.13.3.9", None),
        ("tensorrt", "11.1.0.106", "compiled with headers of TensorRT 10, this is TensorRT 11.1.0.106"),
        ("tensorrt_rtx", "1.7.1.116", None),
        ("tensorrt_rtx", "1.6.1.120", "TensorRT-RTX 1.6.1.120 takes no plugins, 1.7 does"),
    ],
)
def test_the_library_must_fit_the_tensorrt(flavour, version, reason):
    found = unfit(Plugin(Path("lib.so"), "0.1.0", "es24-v1", "0123456789ab", 10), flavour, version)
    assert found == reason if reason is None else reason in found


RTX_SCRIPT = """
import sys
from pathlib import Path
from esparse_trt.engine import plugin
from esparse_trt.errors import EsparseError
try:
    first = plugin.load("tensorrt_rtx", Path(sys.argv[1]))
    assert plugin.load("tensorrt_rtx", Path(sys.argv[1])) is first
    import tensorrt_rtx
    creators = tensorrt_rtx.get_plugin_registry().all_creators
    print(sorted(creator.name for creator in creators if creator.plugin_namespace == "esparse"))
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "pydantic", "rich", "yaml"} & sys.modules.keys()
    assert not heavy, heavy
except EsparseError as error:
    print(error)
"""


def load_in_a_process(path: Path) -> str:
    """A registry of plugins belongs to a process."""
    done = subprocess.run([sys.executable, "-c", RTX_SCRIPT, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(rtx is None, reason="TensorRT-RTX is not installed")
def test_the_operators_are_registered_once():
    assert load_in_a_process(built_library()).strip() == str(sorted(plugin.OPERATORS))


@pytest.mark.skipif(rtx is None, reason="TensorRT-RTX is not installed")
def test_the_library_that_answers_for_rtx_must_lie_beside_the_plugin(tmp_path):
    copy = shutil.copy(built_library(), tmp_path)
    assert f"{tmp_path}/rtx/libtensorrt_rtx.so" in load_in_a_process(copy)


@needs_compiler
@pytest.mark.skipif(rtx is None, reason="TensorRT-RTX is not installed")
def test_a_library_that_tensorrt_does_not_take_is_refused(tmp_path):
    path = compile_library(tmp_path / "libfake.so", FAKE, VERSION="0.1.0", LAYOUT="es24-v1")
    (tmp_path / "rtx").mkdir()
    compile_library(tmp_path / "rtx" / "libtensorrt_rtx.so", "int nothing;")
    assert "does not take the library" in load_in_a_process(path)
