"""Seconds and peak memory of every pruning method on one decoder block with the shapes of LLaMA-7B.

    python3 tests/benchmarks/methods_7b.py [--tokens 262144] [--out methods_7b.json]

Weights are random and inputs correlated, with uneven channels. Every method is timed over the four sites of
the block (qkv, o, gate_up, down) with what it needs at hand: weights and statistics on the device. Then whole
blocks are pruned end to end from a one-block checkpoint, streaming of the calibration text included. Each
figure is the second of two runs, but for those above ten seconds, which are run once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from esparse_trt.sections import PermuteSection, PruneSection, ScoreSection, UpdateSection
from esparse_trt.sparsity import permute
from esparse_trt.sparsity.pattern import Pattern, nm_mask
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.sparsity.score import ChannelStatistics, error, score
from esparse_trt.sparsity.update import update

HIDDEN, INNER, HEADS = 4096, 11008, 32
SITES = {
    "qkv": (3 * HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
PATTERN = Pattern(2, 4)
SCORES = ("magnitude", "wanda", "ria", "e_sparse", "obd", "obs")
PERMUTATIONS: dict[str, dict[str, Any]] = {
    "global": {"local": None},
    "global, local 256": {},
    "global, local full width": {"local": {"block": "full"}},
}
ASSIGNMENT = {"local": None, "assign": 1}  # last: its solver runs on one CPU core for a minute and more
UPDATES: dict[str, dict[str, Any]] = {
    "SparseGPT": {"sweep": "column", "refit": 0},
    "obs, group sweep": {"refit": 0},
    "obs, group sweep, refit": {},
    "obs, fixed mask, refit": {"mask": "fixed"},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "e_sparse": {},
    "wanda, obs": {"score": {"method": "wanda"}, "update": {"method": "obs"}},
    "wanda, obs, 50 steps of recovery": {
        "score": {"method": "wanda"}, "update": {"method": "obs"}, "recover": {"steps": 50},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens of whole blocks")
    parser.add_argument("--out", type=Path, default=Path("methods_7b.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []

    def measure(what: str, method: str, work: Callable[[], object]) -> None:
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            if seconds > 10:
                break
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rows.append(
            {"what": what, "method": method, "seconds": round(seconds, 4), "peak_gib": round(peak, 2)}
        )
        arguments.out.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1)
        )
        print(f"{what:12} {method:36} {seconds:8.3f} s {peak:6.2f} GiB", flush=True)

    block = _block(device)
    for method in SCORES:
        measure("score, mask", method, lambda method=method: _masks(block, method))  # type: ignore[misc]
    for method, changes in UPDATES.items():
        settings = UpdateSection.model_validate({"method": "obs"} | changes)
        measure("update", method, lambda settings=settings: _update(block, settings))  # type: ignore[misc]
    for method, changes in PERMUTATIONS.items():
        section = PermuteSection.model_validate(changes)
        measure("permutation", method, lambda section=section: _permutations(block, section))  # type: ignore[misc]
    block.clear()
    with tempfile.TemporaryDirectory() as folder:
        windows = _checkpoint(Path(folder), arguments.tokens)
        for method, changes in BLOCKS.items():
            whole = PruneSection.model_validate(changes)
            measure("whole block", method, lambda whole=whole: prune_model(Path(folder), windows, whole))  # type: ignore[misc]
    block = _block(device)
    section = PermuteSection.model_validate(ASSIGNMENT)
    measure("permutation", "global, assignment", lambda: _permutations(block, section))


def _block(device: torch.device) -> dict[str, tuple[Tensor, ChannelStatistics]]:
    """Weight [N, K] in fp16 and statistics of the inputs of every site."""
    torch.manual_seed(0)
    made = {}
    for name, (rows, channels) in SITES.items():
        weight = (torch.randn(rows, channels, device=device) * 0.02).half()
        tokens = 4 * channels
        x = torch.randn(tokens, channels // 4, device=device) @ torch.randn(
            channels // 4, channels, device=device
        )
        x = (x / 50 + torch.randn(tokens, channels, device=device)) * torch.rand(
            channels, device=device
        ).exp()
        entropy = torch.rand(channels, dtype=torch.float64, device=device)
        made[name] = weight, ChannelStatistics(x.norm(dim=0).double(), entropy, tokens, x.T @ x)
    return made


def _scores(weight: Tensor, statistics: ChannelStatistics, method: str) -> Tensor:
    return score(weight, statistics, ScoreSection.model_validate({"method": method}))


def _masks(block: dict[str, tuple[Tensor, ChannelStatistics]], method: str) -> None:
    for weight, statistics in block.values():
        nm_mask(_scores(weight, statistics, method), PATTERN)


def _permutations(block: dict[str, tuple[Tensor, ChannelStatistics]], section: PermuteSection) -> None:
    for name, (weight, statistics) in block.items():
        wanted = error(_scores(weight, statistics, "wanda"), ScoreSection(method="wanda"))
        if name == "o":
            permute.choose_heads(wanted, PATTERN, section, heads=HEADS, kv_heads=HEADS)
        else:
            permute.choose(wanted.unsqueeze(0), PATTERN, section)


def _update(block: dict[str, tuple[Tensor, ChannelStatistics]], section: UpdateSection) -> None:
    for weight, statistics in block.values():
        assert statistics.hessian is not None
        fixed = nm_mask(_scores(weight, statistics, "wanda"), PATTERN) if section.mask == "fixed" else None
        update(weight, statistics.hessian, fixed, PATTERN, section)


def _checkpoint(folder: Path, tokens: int) -> Tensor:
    """A model of one block with random weights; returns random calibration windows."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=HEADS, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    length = min(2048, tokens)
    return torch.randint(0, 1024, (tokens // length, length))


if __name__ == "__main__":
    main()
