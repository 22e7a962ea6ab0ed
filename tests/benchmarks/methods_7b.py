"""Seconds and peak memory of every pruning method on one decoder block with the shapes of LLaMA-7B.

    python3 tests/benchmarks/methods_7b.py [--only permutation] [--tokens 262144] [--out FILE]

Weights are random and inputs correlated, with uneven channels. Every method is timed over the four sites of
the block (qkv, o, gate_up, down) with what it needs at hand: weights and statistics on the device. Then whole
blocks are pruned end to end from a one-block checkpoint, streaming of the calibration text included. Each
figure is the second of two runs, but for those above three seconds, which are run once. Rows are written as
they come, and replace those of the same name in the file. `kept` is the share of squared Wanda scores that
a 2:4 mask keeps after the permutation, mean over the sites.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from esparse_trt.sections import PermuteSection, PruneSection, ScoreSection, UpdateSection
from esparse_trt.sparsity import permute
from esparse_trt.sparsity.pattern import Pattern, kept_score, nm_mask
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.sparsity.refine import refine
from esparse_trt.sparsity.score import ChannelStatistics, error, score
from esparse_trt.sparsity.update import update

T = TypeVar("T")

KINDS = ("score, mask", "permutation", "update", "whole block")
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
    "none": {"global": "none", "local": None},
    "global": {"local": None},
    "global, local 256": {"local": {"block": 256}},
    "global, local full width": {},
    "local full width": {"global": "none"},
    "global, assignment": {"local": None, "assign": 1},
    "global, local full width, refined": {"refine": {}},
}
UPDATES: dict[str, dict[str, Any]] = {
    "SparseGPT": {"descent": 0, "refit": 0},
    "obs, no descent": {"descent": 0},
    "obs, no refit": {"refit": 0},
    "obs": {},
    "obs, fixed mask": {"mask": "fixed"},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "e_sparse, both shuffles": {"permute": {"attention": "fold"}},
    "e_sparse": {},
    "e_sparse, refined": {"permute": {"refine": {}}},
    "wanda, obs": {"score": {"method": "wanda"}, "update": {"method": "obs"}},
    "wanda, obs, 50 steps of recovery": {
        "score": {"method": "wanda"}, "update": {"method": "obs"}, "recover": {"steps": 50},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens of whole blocks")
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of rows; default: all")
    parser.add_argument("--skip", action="append", default=[], help="methods to leave out")
    parser.add_argument("--out", type=Path, default=Path("methods-7b.json"))
    arguments = parser.parse_args()
    kinds = arguments.only or KINDS

    def left(methods: Iterable[str]) -> list[str]:
        return [method for method in methods if method not in arguments.skip]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Results(arguments.out, torch.cuda.get_device_name() if device.type == "cuda" else "CPU")
    block = _block(device) if set(kinds) != {"whole block"} else {}
    if "score, mask" in kinds:
        for method in left(SCORES):
            table.measure("score, mask", method, partial(_masks, block, method))
    if "permutation" in kinds:
        for method in left(PERMUTATIONS):
            section = PermuteSection.model_validate(PERMUTATIONS[method])
            found = table.measure("permutation", method, partial(_permutations, block, section))
            table.add(kept=round(_kept(block, found), 6))
    if "update" in kinds:
        for method in left(UPDATES):
            settings = UpdateSection.model_validate({"method": "obs"} | UPDATES[method])
            table.measure("update", method, partial(_update, block, settings))
    block.clear()
    if "whole block" in kinds:
        with tempfile.TemporaryDirectory() as folder:
            windows = _checkpoint(Path(folder), arguments.tokens)
            for method in left(BLOCKS):
                whole = PruneSection.model_validate(BLOCKS[method])
                table.measure("whole block", method, partial(prune_model, Path(folder), windows, whole))
                table.add(tokens=windows.numel())


class Results:
    """The rows of the file, by what was measured."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        stored = json.loads(path.read_text()) if path.exists() else {"device": device, "rows": []}
        self.rows = stored["rows"] if stored["device"] == device else []
        print(f"{device}, torch {torch.__version__}")

    def measure(self, what: str, method: str, work: Callable[[], T]) -> T:
        """Time the work, twice if it is short, and store the second time and the peak of device memory."""
        gpu = torch.cuda.is_available()
        for _ in range(2):
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            result = work()
            if gpu:
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            if seconds > 3:
                break
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        self.rows = [row for row in self.rows if (row["what"], row["method"]) != (what, method)]
        self.rows.append({"what": what, "method": method})
        self.add(seconds=round(seconds, 4), peak_gib=round(peak, 2), torch=torch.__version__)
        print(f"{what:12} {method:36} {seconds:8.3f} s {peak:6.2f} GiB", flush=True)
        return result

    def add(self, **facts: Any) -> None:
        """Facts of the last row."""
        self.rows[-1] |= facts
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({"device": self.device, "rows": self.rows}, indent=1) + "\n")


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


def _wanted(weight: Tensor, statistics: ChannelStatistics) -> Tensor:
    return error(_scores(weight, statistics, "wanda"), ScoreSection(method="wanda"))


def _permutations(
    block: dict[str, tuple[Tensor, ChannelStatistics]], section: PermuteSection
) -> dict[str, Tensor]:
    found = {}
    for name, (weight, statistics) in block.items():
        wanted = _wanted(weight, statistics)
        if name == "o":
            found[name] = permute.choose_heads(wanted, PATTERN, section, heads=HEADS, kv_heads=HEADS).final
        else:
            found[name] = permute.choose(wanted.unsqueeze(0), PATTERN, section).final[0]
        if section.refine is not None:
            found[name] = _refined(weight, statistics, found[name], section.refine.rounds)
    return found


def _refined(weight: Tensor, statistics: ChannelStatistics, start: Tensor, rounds: int) -> Tensor:
    assert statistics.hessian is not None
    scores = _scores(weight, statistics, "wanda")
    return refine(weight, scores, statistics.hessian, None, start, PATTERN, rounds)


def _kept(block: dict[str, tuple[Tensor, ChannelStatistics]], found: dict[str, Tensor]) -> float:
    return fmean(kept_score(_wanted(*block[name])[:, order], PATTERN) for name, order in found.items())


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
