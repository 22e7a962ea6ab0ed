"""What `esparse-trt bench` can measure: the model of a build, or a well-known shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from esparse_trt.artifacts import BuildDir, Manifest, load_manifest
from esparse_trt.errors import EsparseError
from esparse_trt.estimate.check import predict
from esparse_trt.evaluate.bench import run
from esparse_trt.evaluate.bench_grid import Grid
from esparse_trt.evaluate.bench_record import Bench, save_bench
from esparse_trt.model import load_config, load_model, resolve
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import EngineRecord, ExportRecord, PruneRecord
from esparse_trt.runtime import bench as measuring
from esparse_trt.runtime.load import load
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import PruneSection


def bench_shape(shape: str, grid: Grid, dtype: str, path: Path) -> Bench:
    """Measure a shape with random weights into the record at `path`.

    Raises:
        EsparseError: no such shape, or whatever `bench.run` raises.
    """
    config = config_of(shape)
    return _with_predictions(run(ShapeSubject(shape, dtype), grid, path), config, PruneSection(), path)


def bench_build(folder: Path, grid: Grid, dtype: str, path: Path) -> Bench:
    """Measure the pruned model of a build into the record at `path`.

    Raises:
        EsparseError: it is no build with 2:4 layers, or whatever `bench.run` raises.
    """
    subject = BuildSubject.of(folder, dtype, f"esparse-trt bench build/{folder.name}")
    config = load_config(subject.folder.checkpoint)
    bench = _with_predictions(run(subject, grid, path), config, subject.recipe.prune, path)
    measured = {(cell.batch, cell.prompt) for cell in bench.engines}
    missing = [cell for cell in product(grid.batches, grid.prompts) if cell not in measured]
    if missing and "engine" in subject.manifest.stages:
        from esparse_trt.evaluate.bench_engines import measure_engines  # ONNX, which shapes do without

        found, skipped = measure_engines(
            subject.folder,
            subject.manifest.record("export", ExportRecord),
            subject.manifest.record("engine", EngineRecord),
            config.vocab_size,
            missing,
            grid.generated,
        )
        bench = bench.model_copy(update={"engines": [*bench.engines, *found], "engines_skipped": skipped})
        save_bench(bench, path)
    return bench


def _with_predictions(bench: Bench, config: PretrainedConfig, prune: PruneSection, path: Path) -> Bench:
    """The record with what the estimate says of its cells."""
    bench = bench.model_copy(update={"predictions": predict(bench, config, prune)})
    save_bench(bench, path)
    return bench


@dataclass
class ShapeSubject:
    """A shape of `runtime.shapes` with random weights, all linear layers but the head 2:4, each site under a
    permutation of its own, as in most builds.
    """

    name: str
    dtype: str
    reasons: dict[str, str] = field(default_factory=lambda: {"lm_head": "the head is not pruned"})

    _model: PreTrainedModel | None = None

    @property
    def command(self) -> str:
        """What measures it."""
        return f"esparse-trt bench --shape {self.name}"

    @property
    def weights(self) -> str:
        """For people."""
        return "random, permuted"

    def sparse(self) -> PreTrainedModel:
        """Random 2:4 weights, packed; the dense models are made with it."""
        self._model = measuring.random_model(config_of(self.name), getattr(torch, self.dtype))
        orders = measuring.shuffle_channels(self._model)
        twin = measuring.packed_twin(self._model, orders)
        measuring.make_peer(self._model)
        return twin

    def masked(self) -> PreTrainedModel:
        """The same weights, dense."""
        assert self._model is not None
        return self._model

    def dense(self) -> tuple[PreTrainedModel, str]:
        """The same model with random weights in place of the zeros."""
        assert self._model is not None
        measuring.unmask(self._model)
        return self._model, "random weights, none masked"


@dataclass
class BuildSubject:
    """The pruned model of a build folder."""

    folder: BuildDir
    manifest: Manifest
    recipe: Recipe
    dtype: str
    command: str

    @classmethod
    def of(cls, folder: Path, dtype: str, command: str) -> BuildSubject:
        """Of a build folder whose prune stage has finished.

        Raises:
            EsparseError: it is none, or no layer of it is 2:4.
        """
        build = BuildDir(folder)
        manifest = load_manifest(build)
        if manifest is None:
            raise EsparseError(
                "no build.json there", where=folder, fix="give the folder of a build, or --shape NAME"
            )
        pruned = manifest.record("prune", PruneRecord)
        if not any(layer.pattern == "2:4" for layer in pruned.layers):
            raise EsparseError(
                "no layer of this build is 2:4: there is nothing that would run sparse",
                where=folder,
                fix="set prune.pattern: '2:4'",
            )
        recipe = parse_recipe(manifest.recipe, base=build.root, where=build.manifest)
        return cls(build, manifest, recipe, dtype, command)

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe.name

    @property
    def weights(self) -> str:
        """The recipe's fingerprint: equal recipes prune equal models."""
        return self.manifest.fingerprint

    @property
    def reasons(self) -> dict[str, str]:
        """Of layers that are not 2:4, as the prune stage says."""
        layers = self.manifest.record("prune", PruneRecord).layers
        return {
            layer.name: layer.reason or f"{layer.pattern} has no packed form"
            for layer in layers
            if layer.pattern != "2:4"
        }

    def sparse(self) -> PreTrainedModel:
        """The checkpoint, packed."""
        return load(self.folder.root, dtype=getattr(torch, self.dtype), device="cuda")

    def masked(self) -> PreTrainedModel:
        """The checkpoint, dense with its zeros."""
        return self._dense(self.folder.checkpoint)

    def dense(self) -> tuple[PreTrainedModel, str]:
        """The model that was pruned; the masked one where that is not on this machine."""
        try:
            path = resolve(self.recipe.model, self.folder)
        except EsparseError as error:
            note(f"the dense model is not here ({error.what}): the masked checkpoint stands for it")
            text = "the masked checkpoint, of the same shape: the original was not on the machine"
            return self.masked(), text
        return self._dense(path), "the model that was pruned"

    def _dense(self, path: Path) -> PreTrainedModel:
        return measuring.make_peer(load_model(path, getattr(torch, self.dtype), "cuda"))
