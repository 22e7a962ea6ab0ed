"""The pruned checkpoint: the dense model's own files with zeros written into them.

Every file is copied, and in the copies of the safetensors files only the bytes of pruned weights change, and
those of kept ones that were re-fitted. Names, order, dtype, sharding and every other weight are therefore
those of the original, bit for bit, and memory stays at one tensor whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esparse_trt.checkpoint import weight_files
from esparse_trt.errors import EsparseError

_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".safetensors"}


def write_checkpoint(
    source: Path,
    target: Path,
    masks: Iterable[tuple[str, Tensor, Tensor | None]],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Copy a Hugging Face folder, zero the pruned weights and write the re-fitted ones.

    Args:
        source: the dense model.
        target: replaced if it exists, only once the new folder is complete.
        masks: (name of the stored tensor, bool [N, K], True where the weight is kept, weight[mask] in the
            stored dtype or None where kept weights stay as they are).
        tokenizer: saved with the model if it does not lie with it.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = weight_files(source)
    others = [f for f in source.iterdir() if f.is_file() and f.suffix not in _OTHER_WEIGHTS]
    for file in (*others, *weights):
        shutil.copyfile(file, temporary / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    _write([temporary / file.name for file in weights], masks)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def _write(files: list[Path], masks: Iterable[tuple[str, Tensor, Tensor | None]]) -> None:
    places = {name: place for file in files for name, place in _places(file).items()}
    for name, mask, values in masks:
        file, offset, size = places[name]
        width = size // mask.numel()  # bytes a weight; all zero bits are +0 in every float format
        stored = np.memmap(file, np.uint8, "r+", offset, (size,))
        bits, kept = stored.view(f"u{width}"), mask.flatten().numpy()
        bits[~kept] = 0
        if values is not None:
            bits[kept] = values.view(torch.uint8).numpy().view(bits.dtype)
        stored.flush()


def _places(file: Path) -> dict[str, tuple[Path, int, int]]:
    """Tensor -> (file, first byte, bytes), from the header: 8 bytes of length, then JSON, then the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: (
            file,
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def require_space(folder: Path, needed: int) -> None:
    """Raise an EsparseError if the disk that holds `folder` has less than `needed` bytes left."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    available = shutil.disk_usage(existing).free
    if available < needed:
        raise EsparseError(
            f"pruning needs {needed / 2**30:.2f} GiB of disk space and {available / 2**30:.2f} GiB are free",
            where=folder,
            fix="free some space, or use --out on another disk",
        )
