"""The dense model: found, checked and read.

Whatever the recipe names (a folder, a hub id, a GGUF file), the rest of the package sees a local Hugging
Face folder with `config.json`, safetensors and, unless the recipe names it elsewhere, a tokenizer. Weights
are read from safetensors only: pickled checkpoints are refused, and a model's own Python code runs only if
the recipe sets `model.trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from esparse_trt import gguf
from esparse_trt.artifacts import BuildDir
from esparse_trt.checkpoint import (
    check_weights,
    fingerprint,
    first_line,
    iterate_tensors,
    weight_files,
)
from esparse_trt.errors import EsparseError
from esparse_trt.progress import note
from esparse_trt.sections import ModelSection

__all__ = [
    "check_vocabulary",
    "check_weights",
    "download",
    "fingerprint",
    "iterate_tensors",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "weight_files",
]

_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
]


# --- where it is ---------------------------------------------------------------------------------------


def resolve(section: ModelSection, folder: BuildDir | None = None) -> Path:
    """The local Hugging Face folder of the model that the recipe names.

    A hub id is downloaded (or found in the hub's cache); a GGUF file is dequantised once into `folder.source`
    as fp16 safetensors, and reused from there.

    Raises:
        EsparseError: nothing there, no safetensors, the hub cannot be reached or refuses, or the GGUF file
            cannot be read or is not the one that this build converted before.
    """
    if section.hub is not None:
        path = download(section)
    elif section.path is not None and section.path.suffix == ".gguf":
        if folder is None:
            raise ValueError("a GGUF file needs a build folder to be converted into")
        return gguf.convert(section.path, folder.source)
    else:
        assert section.path is not None  # ModelSection wants exactly one of the two
        path = section.path
        if not path.is_dir():
            state = "is a file, not a folder" if path.exists() else "does not exist"
            fix = "set model.path to a Hugging Face folder or a .gguf file, or model.hub to a hub id"
            raise EsparseError(f"the model folder {state}", where=path, fix=fix)
    _require_files(path, named=section.hub or str(path))
    return path


def _require_files(path: Path, *, named: str) -> None:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        fix = "point at the folder that save_pretrained wrote"
        raise EsparseError(f"no config.json in the model folder (found: {found})", where=named, fix=fix)
    if not weight_files(path):
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(path.glob(pattern))]
        what = f"only pickled weights ({', '.join(pickles[:3])})" if pickles else "no model.safetensors"
        fix = (
            "weights are read from safetensors only; convert once, then set model.path to the new folder:\n"
            '    python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{named}', dtype='auto').save_pretrained('converted'); "
            f"T.from_pretrained('{named}').save_pretrained('converted')\""
        )
        raise EsparseError(f"{what} in the model folder", where=named, fix=fix)


def download(section: ModelSection, files: Sequence[str] = _HUB_FILES) -> Path:
    """The local folder of a hub model, with those of the files (globs) that it has.

    Raises:
        EsparseError: the hub cannot be reached, or refuses.
    """
    hub = section.hub or ""
    patterns = [*files, "*.py"] if section.trust_remote_code else list(files)
    local = "or download the model elsewhere and set model.path to its folder"
    note(f"model {hub}: looking in the hub's cache, then downloading")
    try:
        path = huggingface_hub.snapshot_download(hub, revision=section.revision, allow_patterns=patterns)
    except GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{hub}, run `hf auth login`, {local}"
        raise EsparseError("access to this hub model must be granted", where=hub, fix=fix) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        fix = f"check model.hub; for a private model run `hf auth login`, {local}"
        raise EsparseError("the hub has no such model", where=hub, fix=fix) from error
    except RevisionNotFoundError as error:
        what = f"the hub model has no revision {section.revision!r}"
        raise EsparseError(what, where=hub, fix="correct model.revision, or leave it out") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not reached"
        fix = f"connect to the network (and unset HF_HUB_OFFLINE), {local}"
        raise EsparseError(f"the model is not in the local cache and {why}", where=hub, fix=fix) from error
    except OSError as error:
        raise EsparseError(f"downloading failed: {error}", where=hub, fix=f"try again, {local}") from error
    return Path(path)


# --- reading -------------------------------------------------------------------------------------------


def load_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; only causal language models in full precision get through."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        fix = "use a model that this transformers knows, or set model.trust_remote_code if you trust its code"
        raise EsparseError(first_line(error), where=path / "config.json", fix=fix) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        what = f"model type {config.model_type!r} is not a causal language model"
        raise EsparseError(what, where=path / "config.json", fix="use a decoder-only language model")
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        what = f"the checkpoint is quantised ({method}); pruning needs the weights themselves"
        raise EsparseError(
            what, where=path / "config.json", fix="use the fp16, bf16 or fp32 original, or a GGUF"
        )
    return config


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, which is `recipe.model.tokenizer or <model folder>`."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the Rust parser raises plain Exception
        fix = "set model.tokenizer to a folder that holds tokenizer.json or tokenizer.model"
        raise EsparseError(f"no usable tokenizer: {first_line(error)}", where=path, fix=fix) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse a tokenizer whose ordinary or BOS/EOS tokens have no row in the model's embedding.

    Added tokens may lie outside it: Gemma 3's text models ship an image token that they cannot embed.
    """
    rows = config.get_text_config().vocab_size
    special = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None]
    size = max([tokenizer.vocab_size, *(t + 1 for t in special)])
    if size > rows:
        what = f"the tokenizer has {size} tokens but the model's vocab_size is {rows}"
        fix = "set model.tokenizer to the tokenizer that the model was trained with"
        raise EsparseError(what, where=tokenizer.name_or_path or "model.tokenizer", fix=fix)


def load_model(
    path: Path,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The whole model in evaluation mode, with its weights as `dtype`, or as they are stored (`auto`)."""
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True
    )
    return model.to(device).eval()


def resolve_device(name: str) -> torch.device:
    """The device that `prune.device` names; `auto` is CUDA where there is any.

    Raises:
        EsparseError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EsparseError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="prune.device",
            fix="set prune.device to auto or cpu",
        ) from error
    return device
