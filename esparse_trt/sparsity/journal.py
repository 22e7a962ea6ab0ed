"""The journal of an unfinished prune stage: what each finished step decided, and where to go on.

    head.json                   the fingerprint: what the steps depend on
    calibration.safetensors     the calibration tokens
    choice.json                 what each site costs and which stay dense, under a budget
    shared.safetensors          permutations of the residual stream, under `residual: shared`
    block-00012.safetensors     masks (one bit a weight), re-fitted values, permutations and records of a step
    hidden-00012.safetensors    hidden states after that step; only the latest is kept
    distilled.safetensors       values of all layers after the whole model was trained

Files are written under temporary names and renamed; a step's hidden states are written before its decisions,
and the older hidden states deleted after, so a process may be killed at any time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from esparse_trt.artifacts import write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.records import ChannelProfile, LayerChoice, LayerRecord, RecoverRecord
from esparse_trt.sparsity.permute import Choice
from esparse_trt.sparsity.pruned import Pruned


class Journal:
    """The journal in folder `root`; `open` makes or resumes it.

    Attributes:
        done: number of finished steps.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done = 0
        while self._block(self.done).exists():
            self.done += 1

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Start the journal, or check that it belongs to the same work.

        Raises:
            EsparseError: the unfinished run was started with something else; says what changed.
        """
        head = self.root / "head.json"
        if not head.exists():
            shutil.rmtree(self.root, ignore_errors=True)
            self.done = 0
            write_atomic(head, json.dumps(fingerprint, indent=1, sort_keys=True))
            return
        old = _flat(json.loads(head.read_text(encoding="utf-8")))
        new = _flat(json.loads(json.dumps(fingerprint)))
        changed = [
            f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise EsparseError(
                f"pruning stopped after {self.done} steps, and has changed since: {'; '.join(changed)}",
                where=self.root,
                fix="undo the change to resume, or start again with --fresh",
            )

    def close(self) -> None:
        """Remove the journal: the stage is complete."""
        shutil.rmtree(self.root, ignore_errors=True)

    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.root.glob("*"))

    def write(self, step: int, result: Pruned, streams: dict[str, Tensor]) -> None:
        """Record a finished step and the hidden states after it."""
        if streams:
            save(self._hidden(step), streams)
        tensors = {f"mask:{name}": pack(mask) for name, mask in result.masks.items()}
        tensors |= {f"values:{name}": values for name, values in result.values.items()}
        tensors |= {f"permutation:{name}": p for name, p in result.permutations.items()}
        records = {
            "layers": json.dumps([record.model_dump(mode="json") for record in result.layers]),
            "channels": json.dumps([profile.model_dump(mode="json") for profile in result.channels]),
            "recovered": json.dumps([record.model_dump(mode="json") for record in result.recovered]),
        }
        save(self._block(step), tensors, records)
        self.done = step + 1
        if step:
            self._hidden(step - 1).unlink(missing_ok=True)

    def streams(self) -> dict[str, Tensor]:
        """Hidden states after the last finished step."""
        return {name: stream.clone() for name, stream in load_file(self._hidden(self.done - 1)).items()}

    def masks(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Layer, mask and re-fitted values (None: the dense ones) of every pruned layer, one at a time."""
        for step in range(self.done):
            with safe_open(self._block(step), framework="pt") as file:
                shapes = {r["name"]: r["shape"] for r in json.loads(file.metadata()["layers"])}
                fitted = set(_names(file, "values"))
                for name in _names(file, "mask"):
                    values = file.get_tensor(f"values:{name}") if name in fitted else None
                    yield name, unpack(file.get_tensor(f"mask:{name}"), shapes[name]), values

    def decided(self) -> Pruned:
        """What all finished steps decided, but for masks and values."""
        total = Pruned()
        for step in range(self.done):
            with safe_open(self._block(step), framework="pt") as file:
                layers, channels, recovered = (
                    json.loads(file.metadata()[key]) for key in ("layers", "channels", "recovered")
                )
                permutations = {n: file.get_tensor(f"permutation:{n}") for n in _names(file, "permutation")}
            total.add(
                Pruned(
                    permutations=permutations,
                    layers=[LayerRecord.model_validate(record) for record in layers],
                    channels=[ChannelProfile.model_validate(profile) for profile in channels],
                    recovered=[RecoverRecord.model_validate(record) for record in recovered],
                )
            )
        return total

    def save_distilled(self, result: Pruned) -> None:
        """Keep what training the whole model gave."""
        save(self._distilled, result.values, {"record": result.recovered[0].model_dump_json()})

    def distilled(self) -> Pruned | None:
        """What training the whole model gave, None if it was not done."""
        if not self._distilled.exists():
            return None
        with safe_open(self._distilled, framework="pt") as file:
            record = RecoverRecord.model_validate_json(file.metadata()["record"])
        return Pruned(values=load_file(self._distilled), recovered=[record])

    def save_layers(self, choice: LayerChoice) -> None:
        """Keep the choice of layers."""
        write_atomic(self._layers, choice.model_dump_json())

    def layers(self) -> LayerChoice | None:
        """The choice of layers, None if it was not made yet."""
        return LayerChoice.model_validate_json(self._layers.read_bytes()) if self._layers.exists() else None

    def save_tokens(self, windows: Tensor) -> None:
        """Keep the calibration tokens."""
        save(self.root / "calibration.safetensors", {"tokens": windows})

    def tokens(self) -> Tensor | None:
        """The calibration tokens, None if the journal has none."""
        file = self.root / "calibration.safetensors"
        return load_file(file)["tokens"].clone() if file.exists() else None

    def save_shared(self, choice: Choice) -> None:
        """Keep the permutations of the residual stream."""
        save(self.root / "shared.safetensors", {k: p.cpu() for k, p in choice._asdict().items()})

    def shared(self) -> Choice | None:
        """The permutations of the residual stream, None if they were not chosen yet."""
        file = self.root / "shared.safetensors"
        return Choice(**load_file(file)) if file.exists() else None

    @property
    def _layers(self) -> Path:
        return self.root / "choice.json"

    @property
    def _distilled(self) -> Path:
        return self.root / "distilled.safetensors"

    def _block(self, step: int) -> Path:
        return self.root / f"block-{step:05d}.safetensors"

    def _hidden(self, step: int) -> Path:
        return self.root / f"hidden-{step:05d}.safetensors"


def pack(mask: Tensor) -> Tensor:
    """A bool mask as uint8, eight weights a byte."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`."""
    count = shape[0] * shape[1]
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).view(bool).reshape(*shape))


def _names(file: Any, kind: str) -> list[str]:
    return sorted(key.removeprefix(f"{kind}:") for key in file.keys() if key.startswith(f"{kind}:"))  # noqa: SIM118


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # that of any new file; safetensors makes files for their owner alone
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    temporary.chmod(mode)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat
