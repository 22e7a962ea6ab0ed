"""The safetensors files of a Hugging Face folder: listed, streamed, fingerprinted, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from esparse_trt.errors import EsparseError
from esparse_trt.progress import track

INDEX = "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model, in order; empty if there are none."""
    index = path / INDEX
    if index.is_file():
        return [path / name for name in sorted(set(_weight_map(index).values()))]
    return [path / "model.safetensors"] if (path / "model.safetensors").is_file() else []


def iterate_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint with its stored name, read one at a time, file by file."""
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def fingerprint(path: Path) -> str:
    """SHA-256 over config.json and the weights (names, sizes and contents), in sorted order."""
    digest = hashlib.sha256()
    for file in sorted({path / "config.json", *weight_files(path)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# --- checks --------------------------------------------------------------------------------------------


def check_weights(path: Path, *, trust_remote_code: bool = False) -> None:
    """Check that the files are whole and hold every tensor of the model, in its shape, without NaN or Inf.

    Names and shapes are judged by the loader of transformers itself, which knows each family's renamings,
    tied and fused tensors; the model is made on the meta device, so memory stays at one tensor at a time.

    Raises:
        EsparseError: naming the file and sizes, or the tensor with its found and expected shape.
    """
    files = weight_files(path)
    stored = {file: _tensor_names(file) for file in files}
    index = path / INDEX
    if index.is_file():
        for name, file in _weight_map(index).items():
            if name not in stored[path / file]:
                what = f"the index says that {file} holds tensor {name!r}, and it does not"
                raise EsparseError(what, where=index, fix="download the model again, index included")
    _check_shapes(path, trust_remote_code)
    total = sum(len(names) for names in stored.values())
    for name, tensor in track(iterate_tensors(path), "checking weights", total=total, unit="tensor"):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            what = f"tensor {name!r} has {bad} NaN or Inf of {tensor.numel()} values"
            raise EsparseError(what, where=path, fix="use a checkpoint that was saved without overflow")


def _check_shapes(path: Path, trust_remote_code: bool) -> None:
    loader: Any = AutoModelForCausalLM
    try:
        with _quiet():
            _, loading = loader.from_pretrained(
                path,
                dtype="auto",
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        what = f"transformers cannot make this model: {first_line(error)}"
        raise EsparseError(what, where=path, fix="check that config.json fits the weights") from error
    fix = "config.json and the weights belong to different models: download both again"
    for name, found, expected in sorted(loading["mismatched_keys"]):
        what = f"tensor {name!r} has shape {list(found)}, but config.json makes it {list(expected)}"
        raise EsparseError(what, where=path, fix=fix)
    missing = sorted(loading["missing_keys"])
    if missing:
        what = f"{len(missing)} tensors that config.json calls for are missing, {missing[0]!r} first"
        raise EsparseError(what, where=path, fix=fix)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loader's own report off the screen: what it finds is raised as one error."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _tensor_names(file: Path) -> set[str]:
    """Open one file; a wrong size or header is an error that gives both sizes."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except FileNotFoundError as error:
        what = "this file of the model is missing"
        raise EsparseError(what, where=file, fix="download the model again") from error
    except (SafetensorError, OSError) as error:
        what = f"not a whole safetensors file ({_sizes(file)}): {first_line(error)}"
        raise EsparseError(what, where=file, fix="download this file again") from error


def _sizes(file: Path) -> str:
    """The real size of a safetensors file, and the one its header promises where that can be read."""
    actual = f"{file.stat().st_size} bytes"
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 1 << 27)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"{actual}, its header promises {8 + length + max(ends)}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{actual}, header unreadable"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise EsparseError("not a safetensors index", where=index, fix="download it again") from error


def first_line(error: Exception) -> str:
    """The first line of a library's message, which is the part that fits into ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
