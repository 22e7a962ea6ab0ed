"""Run an engine with named arrays, on a machine whose GPU it was built for.

Needs numpy and Polygraphy only, so that it can be carried to a GPU machine without the rest of the package.
"""

from __future__ import annotations

import math
import os
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from esparse_trt.engine import flavour as flavours
from esparse_trt.engine.flavour import Flavour
from esparse_trt.engine.logs import captured, gist
from esparse_trt.errors import EsparseError

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, best, largest


class EngineRunner:
    """A TensorRT engine as a function from named arrays to named arrays.

    Every call picks the optimisation profile that holds the shapes of its inputs, the tightest one if
    several do, so that a decode step runs the kernels chosen for decoding. A call copies inputs and outputs
    between host and device; `seconds` measures without that.

    Args:
        plan: the serialised engine; the plugin that it was built with must be registered (`plugin.load`).
        flavour: the TensorRT that built it, in the same version.

    Raises:
        EsparseError: there is no usable GPU, or TensorRT refuses the engine on it.
    """

    def __init__(self, plan: Path, flavour: Flavour) -> None:
        gpu = flavours.find_gpu()
        if isinstance(gpu, str):
            raise EsparseError(gpu, where=plan, fix="run the engine on a machine with an NVIDIA GPU")
        self.plan = plan
        self._trt = flavours.activate(flavour)
        _show_cuda_runtime_to_polygraphy()
        from polygraphy.backend.trt import EngineFromPath, TrtRunner

        self._runner = TrtRunner(EngineFromPath(str(plan)), name=plan.stem)
        self._try("load", self._runner.activate)
        self.inputs, self.profiles = self._read_engine(self._runner.engine)
        self._profile: int | None = None

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once. The arrays must have the types that the ONNX file declares.

        Raises:
            EsparseError: no profile holds these shapes, or the engine failed.
        """
        given = self._select_profile(feed)
        outputs = self._try("run", lambda: self._runner.infer(given))
        return {name: np.array(value) for name, value in outputs.items()}  # Polygraphy reuses its buffers

    def seconds(self, feed: dict[str, Any], repeats: int) -> list[float]:
        """Wall time of each of some runs until the device is done, outputs left where they are.

        Args:
            feed: torch tensors, where the engine wants them: on the GPU, or it copies them at every run.
            repeats: how many runs.

        Raises:
            EsparseError: as of a call.
        """
        given = self._select_profile(feed)
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._try(
                "run", lambda: self._runner.infer(given, check_inputs=False, copy_outputs_to_host=False)
            )
            found.append(time.perf_counter() - start)
        return found

    def smallest_feed(self) -> dict[str, np.ndarray]:
        """Zeros in the smallest shapes of the first profile: token 0 at position 0."""
        shapes = self.profiles[0]
        return {name: np.zeros(shapes[name][0], dtype) for name, dtype in self.inputs.items()}

    def close(self) -> None:
        """Free the engine and its device memory."""
        self._runner.deactivate()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_engine(self, engine: Any) -> tuple[dict[str, np.dtype], list[dict[str, Shapes]]]:
        """The inputs' types, and per profile the smallest, best and largest shape of each input."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        names = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        types = {name: np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        profiles: list[dict[str, Shapes]] = []
        for index in range(engine.num_optimization_profiles):
            shapes = {name: engine.get_tensor_profile_shape(name, index) for name in names}
            profiles.append(
                {n: (tuple(low), tuple(best), tuple(high)) for n, (low, best, high) in shapes.items()}
            )
        return types, profiles

    def _select_profile(self, feed: dict[str, Any]) -> dict[str, Any]:
        """Switch to the profile that holds the inputs; returns those that the engine reads."""
        index = self._profile_for({name: tuple(feed[name].shape) for name in self.inputs})
        if index != self._profile:
            self._try("switch the profile of", lambda: self._runner.set_profile(index))
            self._profile = index
        return {name: feed[name] for name in self.inputs}

    def _profile_for(self, shapes: dict[str, tuple[int, ...]]) -> int:
        index = choose_profile(shapes, self.profiles)
        if index is None:
            raise EsparseError(
                f"no optimisation profile holds these input shapes: {shapes}",
                where=self.plan,
                fix=f"widen engine.profiles in the recipe and build again; the engine has {self.profiles}",
            )
        return index

    def _try(self, what: str, action: Any) -> Any:
        from polygraphy.exception import PolygraphyException

        with captured(None) as errors:
            try:
                return action()
            except (PolygraphyException, OSError) as error:
                raise EsparseError(
                    f"{self._trt.__name__} {self._trt.__version__} cannot {what} the engine: "
                    f"{gist(errors, error)}",
                    where=self.plan,
                    fix="run it with the TensorRT version that built it, on a GPU that version supports",
                ) from error


def choose_profile(shapes: dict[str, tuple[int, ...]], profiles: list[dict[str, Shapes]]) -> int | None:
    """The index of the tightest profile (least elements at most) that holds `shapes`; none when none does."""

    def holds(profile: dict[str, Shapes]) -> bool:
        return all(
            len(shape) == len(profile[name][0])
            and all(a <= x <= b for a, x, b in zip(profile[name][0], shape, profile[name][2], strict=True))
            for name, shape in shapes.items()
        )

    def largest(index: int) -> int:
        return sum(math.prod(high) for _, _, high in profiles[index].values())

    fitting = [index for index, profile in enumerate(profiles) if holds(profile)]
    return min(fitting, key=largest, default=None)


def _show_cuda_runtime_to_polygraphy() -> None:
    """Let Polygraphy find the libcudart of pip's CUDA 13 packages, whose folder it does not know."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(root).glob("cu*/lib/libcudart.so*"):
            known = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
            if (folder := str(library.parent)) not in known:
                os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*filter(None, known), folder])
