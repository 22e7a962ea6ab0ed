"""Build the engines of a finished build where there is no GPU, run them on a machine that has one, compare.

    python tests/gpu/engines_on_gpu.py pack build/quickstart build/gpu   # any machine with PyPI; no GPU
    python3 tests/gpu/engines_on_gpu.py run build/gpu/bundle.tar results  # machine with a GPU; no network

`pack` makes an environment of its own with TensorRT-RTX 1.6.1 (1.7.1 refuses to run on an H100), builds both
engines there with the package's engine stage, runs both ONNX files through ONNX Runtime on the CPU for the
expected outputs, and packs engines, expectations and TensorRT-RTX for the other machine's Python into one tar
file, beside it the same cut into pieces (`bundle.tar.00`, ...; `cat` puts them together). `run` unpacks it
into a temporary folder and replays prefill and decode steps; each step's cache is the engine's own output of
the step before. It prints a table, writes `engines_on_gpu.json` and fails above the limit;
`tests/gpu/results/engines_h100.json` is what it wrote for the quickstart on an H100.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
RTX = "1.6.1.120"
PACKAGES = [
    f"tensorrt-rtx-cu13=={RTX}", f"tensorrt-rtx-cu13-bindings=={RTX}", f"tensorrt-rtx-cu13-libs=={RTX}",
    "polygraphy==0.53.6", "numpy", "onnx", "onnxruntime", "pydantic", "pyyaml", "rich", "tokenizers",
]  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
XZ = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20},
]
LIMIT = 5e-3  # relative L2 distance of the logits in fp16
DECODE_STEPS = 16
PROMPTS = (
    "The package manager resolves the dependencies of a package before it unpacks the archive, because",
    "A kernel is loaded by the boot loader and mounts the root file system; after that the first process",
)


# --- pack ------------------------------------------------------------------------------------------------


def pack(build: Path, out: Path, python: str, piece_mib: int) -> None:
    """Make the environment, then do the work inside it."""
    out.mkdir(parents=True, exist_ok=True)
    environment = REPO / "build" / f"rtx-{RTX}"
    interpreter = environment / "bin" / "python"
    if not (environment / "ready").exists():
        print(f"making {environment}")
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (environment / "ready").touch()
    work = out / "work"
    command = [interpreter, __file__, "_build", build, work]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    _site_packages(environment, work / "site", python)
    library = _compressed_library(environment, out)
    bundle = out / "bundle.tar"
    with tarfile.open(bundle, "w") as tar:
        tar.add(library, library.name)
        tar.add(_compressed_folder(work), "work.tar.xz")
    _cut(bundle, piece_mib << 20)


def build_engines_and_expectations(build: Path, work: Path) -> None:
    """In the environment: `work/engine/*.plan` and `work/expected.npz`."""
    from esparse_trt.artifacts import BuildDir, load_manifest
    from esparse_trt.engine.build import build_engines
    from esparse_trt.progress import configure
    from esparse_trt.recipe import Recipe
    from esparse_trt.records import ExportRecord

    configure("rich")
    manifest = load_manifest(BuildDir(build))
    assert manifest is not None, f"{build} is no build folder"
    exported = manifest.record("export", ExportRecord)
    shutil.rmtree(work, ignore_errors=True)
    (work / "onnx").mkdir(parents=True)
    for name in ("dense.onnx", "dense.onnx.data", "sparse.onnx", "sparse.onnx.data"):
        (work / "onnx" / name).symlink_to((build / "onnx" / name).resolve())
    record = build_engines(Recipe.model_validate(manifest.recipe), BuildDir(work), exported)
    assert record.version == RTX, (
        f"the engines were built by {record.flavour} {record.version}: {record.skipped}"
    )
    prompt = _prompt(build / "checkpoint" / "tokenizer.json")
    expected = {}
    for name in ("dense", "sparse"):
        expected |= _expect(name, build / "onnx" / f"{name}.onnx", exported.inputs, prompt)
    np.savez_compressed(work / "expected.npz", **expected)
    (work / "engine.json").write_text(record.model_dump_json(indent=1))
    shutil.rmtree(work / "onnx")


def _prompt(tokenizer_file: Path) -> np.ndarray:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids = [tokenizer.encode(text).ids for text in PROMPTS]
    length = min(map(len, ids))
    return np.array([row[:length] for row in ids], np.int64)


def _expect(name: str, path: Path, inputs: list[Any], prompt: np.ndarray) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes for a prefill and greedy decode steps: the fed tokens and all outputs."""
    import onnxruntime

    from esparse_trt.graph.feeds import cache_feed, next_cache, token_feed

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    tokens, past = prompt, 0
    cache = cache_feed(inputs, batch=len(prompt), past=0)
    arrays = {f"{name}/empty/{key}": value for key, value in cache.items()}
    for step in range(1 + DECODE_STEPS):
        feed = token_feed(inputs, tokens, past=past)
        outputs = dict(zip(names, session.run(names, feed | cache), strict=True))
        arrays |= {f"{name}/{step}/in/{key}": value for key, value in feed.items()}
        arrays |= {f"{name}/{step}/out/{key}": value for key, value in outputs.items() if key == "logits"}
        past += tokens.shape[1]
        tokens = outputs["logits"][:, -1:].argmax(-1)
        cache = next_cache(outputs)
    return arrays | {f"{name}/cache/{key}": value for key, value in cache.items()}


def _site_packages(environment: Path, site: Path, python: str) -> None:
    """The Python packages that `run` needs there, for that machine's version of Python."""
    with tempfile.TemporaryDirectory() as wheels:
        platforms = [option for tag in PLATFORMS for option in ("--platform", tag)]
        subprocess.run(
            [environment / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms,
             "--dest", wheels, f"tensorrt-rtx-cu13-bindings=={RTX}", "polygraphy==0.53.6"],
            check=True,
        )  # fmt: skip
        for wheel in Path(wheels).glob("*.whl"):
            shutil.unpack_archive(wheel, site, "zip")
    installed = next(environment.glob("lib/python3*/site-packages"))
    for package in ("tensorrt_rtx", "tensorrt_rtx_libs"):
        ignore = shutil.ignore_patterns("__pycache__", "libtensorrt_rtx.so*")
        shutil.copytree(installed / package, site / package, ignore=ignore)


def _compressed_library(environment: Path, out: Path) -> Path:
    """libtensorrt_rtx.so.1, 217 MiB, as 57 MiB of xz; takes minutes, so it is kept."""
    target = out / f"libtensorrt_rtx-{RTX}.so.1.xz"
    if not target.exists():
        print(f"compressing {target.name}, this takes minutes")
        source = next(environment.glob("lib/python3*/site-packages/tensorrt_rtx_libs/libtensorrt_rtx.so.1"))
        partial = target.with_suffix(".tmp")
        with source.open("rb") as file, lzma.open(partial, "wb", filters=XZ) as packed:
            shutil.copyfileobj(file, packed, 1 << 22)
        partial.replace(target)
    return target


def _compressed_folder(folder: Path) -> Path:
    target = folder.with_suffix(".tar.xz")
    with lzma.open(target, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        tar.add(folder, ".")
    return target


def _cut(bundle: Path, piece: int) -> None:
    for old in bundle.parent.glob(f"{bundle.name}.??"):
        old.unlink()
    count = -(-bundle.stat().st_size // piece)
    even = -(-bundle.stat().st_size // count)
    with bundle.open("rb") as file:
        for index in range(count):
            part = bundle.with_name(f"{bundle.name}.{index:02}")
            part.write_bytes(file.read(even))
            print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")


# --- run -------------------------------------------------------------------------------------------------


def run(bundle: Path, results: Path) -> int:
    """Replay the expected steps on this machine's GPU; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        seconds = _unpack(bundle, work)
        sys.path[:0] = [str(work / "site"), str(REPO)]
        from esparse_trt.engine.flavour import find_gpu

        gpu = find_gpu()
        if isinstance(gpu, str):
            raise SystemExit(gpu)
        engines = {name: _replay(name, work) for name in ("dense", "sparse")}
        import polygraphy
        import tensorrt_rtx

        record = {
            "gpu": gpu.__dict__,
            "versions": {
                "tensorrt_rtx": tensorrt_rtx.__version__,
                "polygraphy": polygraphy.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "expected": "ONNX Runtime on the CPU, same fp16 ONNX files",
            "limit": LIMIT,
            "unpack_seconds": round(seconds, 1),
            "build": json.loads((work / "engine.json").read_text()),
            "engines": engines,
        }
    results.mkdir(parents=True, exist_ok=True)
    (results / "engines_on_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    _print(record)
    worst = max(step["relative_l2"] for engine in engines.values() for step in engine["steps"])
    return 0 if worst <= LIMIT else 1


def _unpack(bundle: Path, work: Path) -> float:
    start = time.monotonic()
    with tarfile.open(bundle) as outer:
        for member in outer:
            stream = outer.extractfile(member)
            assert stream is not None
            if member.name == "work.tar.xz":
                with lzma.open(stream) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
                    tar.extractall(work, filter="data")
            else:
                with lzma.open(stream) as packed, (work / "library").open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 22)
    library = work / "site" / "tensorrt_rtx_libs" / "libtensorrt_rtx.so.1"
    (work / "library").rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the parser's library asks for it by name
    return time.monotonic() - start


def _replay(name: str, work: Path) -> dict[str, Any]:
    from esparse_trt.engine.runner import EngineRunner

    expected = np.load(work / "expected.npz")
    keys = [key.split("/", 1)[1] for key in expected.files if key.startswith(f"{name}/")]
    cache = {
        key.removeprefix("empty/"): expected[f"{name}/{key}"] for key in keys if key.startswith("empty/")
    }
    start = time.monotonic()
    with EngineRunner(work / "engine" / f"{name}.plan", "tensorrt_rtx") as engine:
        load = time.monotonic() - start
        steps = []
        for step in range(1 + DECODE_STEPS):
            prefix = f"{step}/in/"
            feed = {k.removeprefix(prefix): expected[f"{name}/{k}"] for k in keys if k.startswith(prefix)}
            start = time.monotonic()
            outputs = engine(feed | cache)
            seconds = time.monotonic() - start
            want = expected[f"{name}/{step}/out/logits"]
            past = next(iter(cache.values())).shape[2]
            steps.append({"past": past, "sequence": want.shape[1], **_compare(outputs["logits"], want)})
            steps[-1]["seconds"] = round(seconds, 4)
            cache = {
                key.replace("present.", "past_key_values."): value
                for key, value in outputs.items()
                if key != "logits"
            }
    final = {key: expected[f"{name}/cache/{key}"] for key in cache}
    return {
        "load_seconds": round(load, 2),
        "batch": int(want.shape[0]),
        "steps": steps,
        "cache_relative_l2": max(_compare(cache[key], final[key])["relative_l2"] for key in cache),
    }


def _compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, got.dtype, want.shape, want.dtype)
    a, b = got.astype(np.float64), want.astype(np.float64)
    return {
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "max_abs": float(np.abs(a - b).max()),
        "top1_agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def _print(record: dict[str, Any]) -> None:
    gpu, versions = record["gpu"], record["versions"]
    print(f"{gpu['name']}, CUDA {gpu['cuda']}, TensorRT-RTX {versions['tensorrt_rtx']}")
    print(f"{'engine':8}{'past':>6}{'sequence':>10}{'relative L2':>13}{'max abs':>10}{'top-1 agrees':>14}")
    for name, engine in record["engines"].items():
        for step in engine["steps"]:
            print(
                f"{name:8}{step['past']:6}{step['sequence']:10}{step['relative_l2']:13.2e}"
                f"{step['max_abs']:10.4f}{step['top1_agreement']:14.1%}"
            )
        print(f"{name}: cache after the last step {engine['cache_relative_l2']:.2e}")
    print(f"limit {record['limit']:.0e}")


def main() -> int:
    """Parse the command line."""
    if sys.argv[1:2] == ["_build"]:
        build_engines_and_expectations(*map(Path, sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="build and pack; needs no GPU")
    packing.add_argument("build", type=Path, help="a finished build folder, such as build/quickstart")
    packing.add_argument("out", type=Path, help="where the bundle goes")
    packing.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    packing.add_argument("--piece-mib", type=int, default=44, help="largest size of a piece")
    running = commands.add_parser("run", help="run and compare; needs a GPU")
    running.add_argument("bundle", type=Path)
    running.add_argument("results", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        return run(options.bundle, options.results)
    pack(options.build, options.out, options.python, options.piece_mib)
    return 0


if __name__ == "__main__":
    sys.exit(main())
