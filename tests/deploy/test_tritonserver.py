"""The deployed repository behind a real Triton server, where there is one (see install_tritonserver.sh)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from esparse_trt.artifacts import BuildDir
from esparse_trt.deploy.triton import deploy
from esparse_trt.graph.feeds import read_specs
from esparse_trt.recipe import parse_recipe
from esparse_trt.records import EngineRecord, ExportRecord

SERVER = os.environ.get("ESPARSE_TRITONSERVER")
pytestmark = pytest.mark.skipif(not SERVER, reason="ESPARSE_TRITONSERVER names no server")

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> BuildDir:
    folder = BuildDir(tmp_path_factory.mktemp("build"))
    toy.save_toy(folder.sparse_onnx)
    folder.checkpoint.mkdir()
    for file in tiny_llama.glob("*.json"):
        shutil.copy(file, folder.checkpoint)
    inputs, outputs = read_specs(folder.sparse_onnx)
    exported = ExportRecord(
        dtype="float32", opset=20, inputs=inputs, outputs=outputs, linears={}, gathers=[],
        bytes={"dense": 0, "explicit": 0},
    )  # fmt: skip
    no_engine = EngineRecord(
        flavour=None, version=None, skipped="none", dense=None, sparse=None, profiles={}, runnable=False,
        not_runnable="none",
    )  # fmt: skip
    recipe = parse_recipe(
        {
            "name": "toy",
            "model": {"path": "model"},
            "calibration": {"text": {"source": "file", "path": "calibration.txt"}},
            "deploy": {"backend": "python"},
        },
        base=folder.root,
    )
    deploy(recipe, folder, exported, no_engine)
    return folder


@pytest.fixture(scope="module")
def address(folder: BuildDir) -> Iterator[str]:
    """The HTTP address of a server of the repository, on the loopback interface."""
    port, log = free_port(), folder.root / "server.log"
    command = [
        SERVER, f"--model-repository={folder.model_repository}", "--disable-auto-complete-config",
        "--allow-metrics=false", "--allow-grpc=false", "--http-address=127.0.0.1", f"--http-port={port}",
    ]  # fmt: skip
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            for _ in range(240):
                if process.poll() is not None:
                    pytest.fail(f"the server ended: {log.read_text()[-3000:]}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"the server did not get ready: {log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}/v2/models"
        finally:
            process.terminate()


def post(url: str, data: dict) -> dict:
    try:
        with urllib.request.urlopen(url, data=json.dumps(data).encode(), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def test_text_in_text_out(address, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder.checkpoint)
    prompt = [0, *tokenizer("The quick brown", add_special_tokens=False)["input_ids"]]
    expected = tokenizer.decode(toy.continuation(prompt, 9), skip_special_tokens=True)
    answer = post(f"{address}/toy_text/generate", {"text_input": "The quick brown", "max_tokens": 9})
    assert answer["text_output"] == expected
    refused = post(f"{address}/toy_text/generate", {"text_input": "The", "max_tokens": 0})
    assert refused["error"] == "max_tokens must be at least 1, not 0"


def infer(address: str, ids: list[list[int]], past: int) -> dict:
    """Run the network directly, with `past` cached tokens of ones."""
    batch, length = len(ids), len(ids[0])
    cache = np.ones((batch, toy.HEADS, past, toy.DIM), dtype=np.float32)
    arrays = {
        "input_ids": ("INT64", np.array(ids)),
        "attention_mask": ("INT64", np.ones((batch, past + length), dtype=np.int64)),
        "position_ids": ("INT64", np.arange(past, past + length)[None].repeat(batch, axis=0)),
        "past_key_values.0.key": ("FP32", cache),
        "past_key_values.0.value": ("FP32", cache),
    }
    inputs = [
        {"name": name, "datatype": kind, "shape": value.shape, "data": value.reshape(-1).tolist()}
        for name, (kind, value) in arrays.items()
    ]
    return post(f"{address}/toy/infer", {"inputs": inputs})


def test_network_takes_an_empty_cache_and_a_batch(address):
    answer = infer(address, [[3, 5, 9], [8, 8, 1]], past=0)
    outputs = {tensor["name"]: tensor for tensor in answer["outputs"]}
    assert outputs["present.0.key"]["shape"] == [2, toy.HEADS, 3, toy.DIM]
    logits = np.array(outputs["logits"]["data"]).reshape(outputs["logits"]["shape"])
    np.testing.assert_allclose(logits[0, -1], toy.next_logits([3, 5, 9]), rtol=1e-4)
    np.testing.assert_allclose(logits[1, -1], toy.next_logits([8, 8, 1]), rtol=1e-4)
    grown = infer(address, [[4]], past=6)
    shapes = {tensor["name"]: tensor["shape"] for tensor in grown["outputs"]}
    assert shapes["present.0.value"] == [1, toy.HEADS, 7, toy.DIM]


def test_server_refuses_batches_beyond_the_profiles(address):
    assert "batch-size must be <= 4 for 'toy'" in infer(address, [[1]] * 5, past=0)["error"]
