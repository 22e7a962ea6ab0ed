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

import json
import os
import shlex
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
from jinja2 import Environment, PackageLoader, StrictUndefined
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from esparse_trt import model as models
from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.graph.feeds import PAST, PRESENT
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import DeployRecord, EngineRecord, ExportRecord, TensorSpec

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"  # ONNX Runtime 1.27, Python 3.12
DTYPES = {"float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
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
    backend, reason = choose_backend(recipe.deploy.backend, engines)
    limit = max_batch_size(recipe)
    staging = folder.model_repository.with_name(".model_repository.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        plugin = _copy_plugin(engines, staging / name / "1") if backend == "tensorrt" else None
        _write_network(recipe, folder, exported, staging / name, backend, limit, plugin)
        text = f"{name}_text" if _write_text_model(recipe, folder, exported, staging, name, backend) else None
        plugin_path = f"/models/{name}/1/{plugin}" if plugin else None
        command = serve_command(folder.model_repository, backend, text is not None, plugin_path)
        readme = _render(
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


def choose_backend(asked: str, engines: EngineRecord) -> tuple[str, str]:
    """The backend and why it is this one.

    Raises:
        EsparseError: `tensorrt` was asked for and there is no engine that Triton can load.
    """
    obstacle = None
    if engines.sparse is None:
        obstacle = f"there is no engine ({engines.skipped})"
    elif engines.flavour != "tensorrt":
        obstacle = _WHY_NOT_RTX
    if asked == "tensorrt" and obstacle:
        raise EsparseError(
            f"cannot deploy an engine: {obstacle}",
            where="deploy.backend: tensorrt",
            fix="build with engine.flavour: tensorrt on a machine with a GPU, or set deploy.backend to auto",
        )
    if asked in ("tensorrt", "auto") and not obstacle:
        return "tensorrt", f"engine of TensorRT {engines.version}"
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


# --- files -----------------------------------------------------------------------------------------------


def _write_network(
    recipe: Recipe,
    folder: BuildDir,
    exported: ExportRecord,
    target: Path,
    backend: str,
    limit: int,
    plugin: str | None,
) -> None:
    version = target / "1"
    version.mkdir(parents=True, exist_ok=True)
    if backend == "tensorrt":
        _link(folder.sparse_plan, version / "model.plan")
    else:
        copy_onnx(folder.sparse_onnx, version / "model.onnx")
    if backend == "python":
        _copy_template("network_model.py", version / "model.py")
    config = _render(
        "config.pbtxt.j2", name=target.name, backend=backend, limit=limit, instances=recipe.deploy.instances,
        profiles=list(recipe.engine.profiles), inputs=_tensors(exported.inputs),
        outputs=_tensors(exported.outputs), plugin=plugin,
    )  # fmt: skip
    (target / "config.pbtxt").write_text(config, encoding="utf-8")


def _copy_plugin(engines: EngineRecord, target: Path) -> str | None:
    """Copy the library that the engine needs; its file name, or none."""
    if engines.sparse is None or engines.sparse.plugin is None:
        return None
    library = Path(engines.sparse.plugin.library)
    target.mkdir(parents=True)
    try:
        shutil.copyfile(library, target / library.name)
    except OSError as error:
        raise EsparseError(
            f"the plugin that the engine was built with cannot be copied: {error.strerror or error}",
            where=library,
            fix="put it back, or build the engine again: --from engine",
        ) from error
    return library.name


def _tensors(specs: list[TensorSpec]) -> list[dict[str, Any]]:
    """Names, Triton types and dimensions without the batch; dynamic ones are -1."""
    for spec in specs:
        if not spec.shape or spec.shape[0] != "batch":
            raise EsparseError(
                f"the first dimension of `{spec.name}` {spec.shape} is not the batch, as Triton needs it",
                where="sparse.onnx",
                fix="run the build again --from export",
            )
    return [
        {
            "name": spec.name,
            "type": DTYPES[spec.dtype],
            "dims": [size if isinstance(size, int) else -1 for size in spec.shape[1:]],
        }
        for spec in specs
    ]


def _write_text_model(
    recipe: Recipe, folder: BuildDir, exported: ExportRecord, staging: Path, name: str, backend: str
) -> bool:
    """Write `<name>_text`; false where the recipe or the kind of tokenizer rules it out."""
    if not recipe.deploy.text:
        return False
    trust = recipe.model.trust_remote_code
    tokenizer = models.load_tokenizer(folder.checkpoint, trust_remote_code=trust)
    if not tokenizer.is_fast:
        note("no text model: the tokenizer has no tokenizer.json, which is all that the text model can read")
        return False
    target = staging / f"{name}_text"
    version = target / "1"
    version.mkdir(parents=True)
    tokenizer.save_pretrained(version / "tokenizer")
    _copy_template("text_model.py", version / "model.py")
    config = models.load_config(folder.checkpoint, trust_remote_code=trust).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    prompt, total = _length_limits(recipe, context) if backend == "tensorrt" else (context, context)
    settings = {
        "network": name,
        "inputs": [spec.name for spec in exported.inputs if not spec.name.startswith(PAST)],
        "cache": {
            spec.name: [spec.shape[1], spec.shape[3]]
            for spec in exported.inputs
            if spec.name.startswith(PAST)
        },
        "cache_dtype": exported.dtype,
        "bos": tokenizer.bos_token_id,
        "stop": _stop_tokens(folder.checkpoint, tokenizer.eos_token_id),
        "longest_prompt": prompt,
        "longest_sequence": total,
    }
    (version / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (target / "config.pbtxt").write_text(
        _render("text_config.pbtxt.j2", name=target.name, instances=recipe.deploy.instances), encoding="utf-8"
    )
    return True


def _length_limits(recipe: Recipe, context: int | None) -> tuple[int, int]:
    """Longest prompt and longest sequence, in tokens, that the profiles of an engine take."""
    profiles = recipe.engine.profiles.values()
    prompt = max((p.sequence[2] for p in profiles if p.past[0] == 0), default=0)
    total = max(p.past[2] + p.sequence[2] for p in profiles)
    return prompt, min(total, context) if context else total


def _stop_tokens(checkpoint: Path, eos: int | None) -> list[int]:
    """The tokens that end a text: `generation_config.json` knows best, then the tokenizer."""
    path = checkpoint / "generation_config.json"
    stop = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    stop = eos if stop is None else stop
    return [stop] if isinstance(stop, int) else list(stop or [])


def copy_onnx(source: Path, target: Path) -> None:
    """Copy an ONNX file and the data files it names, which keep their names.

    Copies, not hard links: onnx refuses to load data from a file with more than one link, and would refuse
    the original too.
    """
    graph = onnx.load(source, load_external_data=False).graph
    names = {ExternalDataInfo(t).location for t in graph.initializer if uses_external_data(t)}
    shutil.copyfile(source, target)
    for name in names:
        shutil.copyfile(source.with_name(name), target.with_name(name))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _replace(new: Path, old: Path) -> None:
    """Put a finished folder in the place of another one."""
    retired = old.with_name(f".{old.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)


def _copy_template(name: str, target: Path) -> None:
    text = (resources.files("esparse_trt.deploy") / "templates" / name).read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")


def _render(template: str, **facts: Any) -> str:
    environment = Environment(
        loader=PackageLoader("esparse_trt.deploy"),
        autoescape=False,  # protobuf text and Markdown; names are restricted by the recipe's schema
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**facts)
