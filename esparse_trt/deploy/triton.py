"""The deploy stage: a Triton Inference Server model repository.

    model_repository/
      README.md                     what is in here and the command that serves it
      <name>/config.pbtxt           the network: tensors in, tensors out, KV cache included
      <name>/1/model.plan           or model.onnx, its data, and model.py for the Python backend
      <name>/1/libesparse_trt_plugin.so    if the engine was built with it; the server must load it first
      <name>_text/config.pbtxt      text in, text out: tokenizer and KV-cache loop around the network
      <name>_text/1/                model.py, settings.json, tokenizer/

Batching. Every input and output has the batch as its first dimension, so `max_batch_size` is positive and
that dimension is left out of `dims`, as Triton wants: a request still sends `[batch, ...]`, and the server
refuses batches that no profile takes. The alternative, `max_batch_size: 0` with all dimensions written out,
would make the limit invisible and batching impossible. The dynamic batcher joins only requests whose other
dimensions are all equal, thus never sequences whose caches differ in length. Triton takes tensors without
elements, so the first request of a sequence sends an empty cache, `[batch, kv_heads, 0, head_dim]`.

The folder is written under another name and renamed, so that a server polling it never sees half of it.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from esparse_trt.artifacts import BuildDir
from esparse_trt.deploy.network import copy_plugin, write_network
from esparse_trt.deploy.render import render
from esparse_trt.deploy.text import write_text_model
from esparse_trt.errors import EsparseError
from esparse_trt.graph.feeds import PAST, PRESENT
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import DeployRecord, EngineRecord, ExportRecord

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"  # ONNX Runtime 1.27, Python 3.12
_WHY_NOT_RTX = (
    "the engines are of TensorRT-RTX, and Triton's tensorrt backend loads engines of TensorRT proper only"
)


def deploy(recipe: Recipe, folder: BuildDir, exported: ExportRecord, engines: EngineRecord) -> DeployRecord:
    """Write `folder.model_repository`, replacing an earlier one.

    Raises:
        EsparseError: the recipe asks for an engine that Triton could not load, or for larger batches than
            the profiles take; the tokenizer cannot be read.
    """
    name = recipe.deploy.model_name or recipe.name
    backend, reason = choose_backend(recipe.deploy.backend, engines.flavour, engines.version, engines.skipped)
    limit = max_batch_size(recipe)
    staging = folder.model_repository.with_name(".model_repository.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        plugin = copy_plugin(engines, staging / name / "1") if backend == "tensorrt" else None
        write_network(recipe, folder, exported, staging / name, backend, limit, plugin)
        text = f"{name}_text" if write_text_model(recipe, folder, exported, staging, name, backend) else None
        plugin_path = f"/models/{name}/1/{plugin}" if plugin else None
        command = serve_command(folder.model_repository, backend, text is not None, plugin_path)
        readme = render(
            "README.md.j2", recipe=recipe, exported=exported, engines=engines, name=name, text=text,
            backend=backend, reason=reason, limit=limit, command=command, image=IMAGE, plugin=plugin_path,
            past=PAST, present=PRESENT,
        )  # fmt: skip
        (staging / "README.md").write_text(readme, encoding="utf-8")
        _replace(staging, folder.model_repository)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    note(f"Triton model repository with the {backend} backend: {reason}")
    files = sorted(path for path in folder.model_repository.rglob("*") if path.is_file())
    return DeployRecord(
        model_name=name,
        text_model=text,
        backend=backend,
        reason=reason,
        max_batch_size=limit,
        files=[str(path.relative_to(folder.root)) for path in files],
        command=command,
    )


# --- choices ---------------------------------------------------------------------------------------------


def choose_backend(
    asked: str, flavour: str | None, version: str | None, skipped: str | None
) -> tuple[str, str]:
    """The backend and why it is this one.

    Args:
        asked: the recipe's `deploy.backend`.
        flavour: the TensorRT of the engines; none: there are none.
        version: of that TensorRT.
        skipped: why there are no engines.

    Raises:
        EsparseError: `tensorrt` was asked for and there is no engine that Triton can load.
    """
    obstacle = None
    if flavour is None:
        obstacle = f"there is no engine ({skipped})"
    elif flavour != "tensorrt":
        obstacle = _WHY_NOT_RTX
    if asked == "tensorrt" and obstacle:
        raise EsparseError(
            f"cannot deploy an engine: {obstacle}",
            where="deploy.backend: tensorrt",
            fix="build with engine.flavour: tensorrt on a machine with a GPU, or set deploy.backend to auto",
        )
    if asked in ("tensorrt", "auto") and not obstacle:
        return "tensorrt", f"engine of TensorRT {version}"
    if asked == "auto":
        return "onnxruntime", f"sparse.onnx, because {obstacle}"
    return asked, "the recipe asks for it"


def max_batch_size(recipe: Recipe) -> int:
    """The largest batch that a request may have.

    Raises:
        EsparseError: the recipe wants more than the largest profile takes; Triton would not load the model.
    """
    batches = [profile.batch[2] for profile in recipe.engine.profiles.values()]
    asked = recipe.deploy.max_batch_size
    if asked is not None and asked > max(batches):
        raise EsparseError(
            f"{asked} is larger than the largest batch of the profiles, {max(batches)}",
            where="deploy.max_batch_size",
            fix="lower it, or raise the batch of a profile in engine.profiles",
        )
    return asked or min(batches)


def serve_command(repository: Path, backend: str, text: bool, plugin: str | None = None) -> str:
    """A shell command that serves the repository on this machine's loopback interface.

    Args:
        repository: its folder, which is /models inside the container.
        backend: of the network.
        text: whether there is a text model.
        plugin: path in the container of the library that the engine needs.
    """
    packages = ["tokenizers"] if text else []
    packages += ["onnxruntime"] if backend == "python" else []
    server = "tritonserver --model-repository=/models"
    server += f" --backend-config=tensorrt,plugins={plugin}" if plugin else ""
    if packages:
        server = f"bash -c 'pip install --quiet {' '.join(packages)} && exec {server}'"
    gpus = "" if backend == "python" else " --gpus=all"
    return (
        f"docker run --rm{gpus} --shm-size=1g -p 127.0.0.1:8000-8002:8000-8002 "
        f"-v {shlex.quote(f'{repository}:/models:ro')} {IMAGE} {server}"
    )


def _replace(new: Path, old: Path) -> None:
    """Put a finished folder in the place of another one."""
    retired = old.with_name(f".{old.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)
