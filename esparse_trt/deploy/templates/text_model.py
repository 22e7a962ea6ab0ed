"""Text in, text out, in Triton's Python backend: tokenizer, prefill, then one token a step with the KV cache.

A reference, not a high-throughput server: each request runs by itself, and the cache passes through host
memory at every step. Needs the package tokenizers in the server's Python.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

DEFAULT_TOKENS = 64


class TritonPythonModel:
    """The class that the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read `settings.json` and the tokenizer from the version folder."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; a request that fails does not take the others with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            text = optional(request, "text_input", None).decode("utf-8")
            answer = self.generate(
                text,
                max_tokens=int(optional(request, "max_tokens", DEFAULT_TOKENS)),
                temperature=float(optional(request, "temperature", 0.0)),
                seed=optional(request, "seed", None),
            )
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensor = pb_utils.Tensor("text_output", np.array([answer.encode("utf-8")], dtype=object))
        return pb_utils.InferenceResponse(output_tensors=[tensor])

    def generate(self, text: str, max_tokens: int, temperature: float, seed: int | None) -> str:
        """The continuation of a text: greedy at temperature 0, else sampled."""
        prompt = self.tokenizer.encode(text, add_special_tokens=False).ids
        bos = self.settings["bos"]
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        self._check_lengths(prompt, max_tokens, temperature)
        random = np.random.default_rng(seed)
        cache = {
            name: np.zeros((1, heads, 0, dim), dtype=self.settings["cache_dtype"])
            for name, (heads, dim) in self.settings["cache"].items()
        }
        new: list[int] = []
        ids = prompt
        while len(new) < max_tokens:
            logits, cache = self._step(ids, cache, past=len(prompt) + len(new) - len(ids))
            token = choose(logits, temperature, random)
            if token in self.settings["stop"]:
                break
            new.append(token)
            ids = [token]
        # Decoding both and cutting keeps the space that some tokenizers drop at the start of a text.
        return self.tokenizer.decode(prompt + new)[len(self.tokenizer.decode(prompt)) :]

    def _check_lengths(self, prompt: list[int], max_tokens: int, temperature: float) -> None:
        longest_prompt, longest = self.settings["longest_prompt"], self.settings["longest_sequence"]
        if not prompt:
            raise ValueError("text_input is empty, and the tokenizer has no BOS token to start from")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        if not (np.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {temperature}")
        if longest_prompt is not None and len(prompt) > longest_prompt:
            raise ValueError(f"text_input has {len(prompt)} tokens; the model takes {longest_prompt} at once")
        if longest is not None and len(prompt) + max_tokens > longest:
            raise ValueError(
                f"{len(prompt)} tokens of text_input and {max_tokens} max_tokens exceed {longest} in all"
            )

    def _step(
        self, ids: list[int], cache: dict[str, np.ndarray], past: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Run the network on `ids` after `past` cached tokens: last logits `[vocab]`, and the grown cache."""
        total = past + len(ids)
        feed = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        feed = {name: feed[name] for name in self.settings["inputs"]} | cache
        present = {name: name.replace("past_key_values.", "present.", 1) for name in cache}
        request = pb_utils.InferenceRequest(
            model_name=self.settings["network"],
            requested_output_names=["logits", *present.values()],
            inputs=[pb_utils.Tensor(name, value) for name, value in feed.items()],
            # Wherever the network runs, numpy needs its outputs in host memory.
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise ValueError(response.error().message())
        # Copied, because the arrays are views into memory that goes with the response.
        outputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
        return outputs["logits"][0, -1].astype(np.float64), {
            name: outputs[source] for name, source in present.items()
        }


def optional(request: Any, name: str, default: Any) -> Any:
    """The only element of an input, or the default where the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]


def choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """The most likely token, or a sample from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(random.choice(len(weights), p=weights / weights.sum()))
