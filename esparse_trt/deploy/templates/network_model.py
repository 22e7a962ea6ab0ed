"""The network in Triton's Python backend: ONNX Runtime on the CPU, one run a request.

For servers that do not have the onnxruntime backend. Needs the package onnxruntime in the server's Python.
"""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load `model.onnx` from the version folder."""
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; a request that fails does not take the others with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        wanted = [name for name in self.outputs if name in request.requested_output_names()]
        try:
            values = self.session.run(wanted, feed)
        except Exception as error:  # ONNX Runtime has no common base class of its own
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(name, value) for name, value in zip(wanted, values, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)
