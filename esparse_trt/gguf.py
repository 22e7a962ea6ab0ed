"""A GGUF file as a dense Hugging Face folder.

llama.cpp's quantised blocks are unpacked by transformers and saved once as fp16 safetensors. What is pruned
afterwards is the dequantised model: its perplexity, not that of the unquantised original, is the baseline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from esparse_trt.artifacts import sha256_file, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.progress import note

_RECORD = "gguf.json"  # in the converted folder: which file it was made from


def convert(file: Path, target: Path) -> Path:
    """Dequantise `file` into the folder `target` as fp16 safetensors with its tokenizer, once.

    Raises:
        EsparseError: no GGUF file, damaged, an architecture that transformers cannot read, no disk space, or
            `target` was made from another file.
    """
    _check_magic(file)
    identity: dict[str, Any] = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}
    if (target / _RECORD).is_file():
        made_from = json.loads((target / _RECORD).read_text(encoding="utf-8"))
        if made_from["sha256"] != identity["sha256"]:
            what = f"this build was made from {made_from['file']} (SHA-256 {made_from['sha256'][:12]}…), but "
            what += f"the file is now another one ({identity['sha256'][:12]}…)"
            raise EsparseError(what, where=file, fix="build with --fresh, or into another folder")
        return target

    note(f"dequantising {file.name} to fp16 safetensors, once")
    model, tokenizer = _read(file)
    _require_space(target, 2 * sum(t.numel() for t in model.state_dict().values()))
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_atomic(temporary / _RECORD, json.dumps(identity, indent=1))
    temporary.rename(target)
    return target


def read_config(file: Path) -> PretrainedConfig:
    """The model's configuration, from the file's metadata alone."""
    _check_magic(file)
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise _unreadable(file, error) from error


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        what = f"cannot read the GGUF file: {error.strerror}"
        raise EsparseError(what, where=file, fix="correct model.path") from error
    if magic != b"GGUF":
        what = f"not a GGUF file: it starts with {magic!r}"
        raise EsparseError(what, where=file, fix="download the file again")


def _read(file: Path) -> tuple[Any, Any]:
    """The dequantised model, as an ordinary fp16 model, and its tokenizer."""
    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told otherwise
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        if not _begins_with_bos(file):
            tokenizer.bos_token = None
        loaded, loading = loader.from_pretrained(
            file.parent, dtype=torch.float16, output_loading_info=True, **options, **unpack
        )
    except Exception as error:
        raise _unreadable(file, error) from error
    if loading["missing_keys"]:
        what = f"tensor {min(loading['missing_keys'])!r} is missing"
        raise EsparseError(what, where=file, fix="use a file that holds the whole model, not one of a split")
    return _plain(loaded), tokenizer


def _begins_with_bos(file: Path) -> bool:
    """Whether texts begin with the BOS that the file names.

    Qwen2.5's files name <|endoftext|> and say that it is never put first, which older releases of
    transformers heed and newer ones do not. With it the model loses 0.2 nats a token (*measured*).
    """
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return field is None or bool(field.parts[field.data[0]][0])


def _unreadable(file: Path, error: Exception) -> EsparseError:
    """For a damaged file, on which gguf, numpy and transformers each raise their own kinds."""
    what = f"cannot read the GGUF file: {type(error).__name__}: {error}"
    fix = "check that it is complete, one file, and of an architecture that transformers reads from GGUF"
    return EsparseError(what, where=file, fix=fix)


def _plain(loaded: Any) -> Any:
    """The same weights in a model that knows nothing of GGUF, so that it saves as an ordinary checkpoint."""
    config = type(loaded.config).from_dict(
        {
            k: v
            for k, v in loaded.config.to_dict().items()
            if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _require_space(target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        what = (
            f"the dequantised model needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free"
        )
        fix = "free some space, or build into a folder on another disk"
        raise EsparseError(what, where=target.parent, fix=fix)
