"""How export time and memory grow with the size of the model.

Random LLaMA checkpoints in fp16, of one width and more and more layers, are exported each in a process of its
own. Written: a table (Markdown on standard output), `export_scaling.json`, and a straight line fitted to time
and memory. Exit code 1 if a peak resident set exceeds 1.5 times the fp16 checkpoint plus 2 GiB.

    python tests/benchmarks/export_scaling.py --out build/export_scaling

needs about three times the largest checkpoint on disk (6 GB), removed as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = (2, 8, 28)  # 0.15, 0.32 and 0.89 billion parameters
GIB = 2**30


def config_of(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=12, head_dim=128,
    )  # fmt: skip


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random fp16 checkpoint, one shard per decoder block; its number of parameters."""
    config = config_of(layers)
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append(name)
    index = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        save_file({name: (torch.randn(shapes[name]) * 0.02).half() for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(shape.numel() for shape in shapes.values())


SITES = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): 1536,
    ("self_attn.o_proj",): 1536,
    ("mlp.gate_proj", "mlp.up_proj"): 1536,
    ("mlp.down_proj",): 4096,
}


def export_once(folder: Path, layers: int) -> None:
    """In the process that is measured: export the checkpoint as it is, and with every site permuted."""
    from esparse_trt.graph.export import export_models

    permutations = {}
    for layer in range(layers):
        for names, channels in SITES.items():
            order = torch.randperm(channels)
            permutations |= {f"model.layers.{layer}.{name}": order for name in names}
    start, cpu_start = time.perf_counter(), time.process_time()
    record = export_models(
        folder,
        folder,
        permutations,
        dense_path=folder / "onnx" / "dense.onnx",
        explicit_path=folder / "onnx" / "explicit.onnx",
        dtype="float16",
        opset=20,
    )
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "onnx_bytes": sum(record.bytes.values()),
    }
    print(json.dumps(figures))


def measure(layers: int, work: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        parameters = write_checkpoint(folder, layers)
        checkpoint = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, __file__, "--child", name, "--layers", str(layers)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {"layers": layers, "parameters": parameters, "checkpoint_bytes": checkpoint}
    return row | json.loads(output.splitlines()[-1]) | {"rss_limit": 1.5 * checkpoint + 2 * GIB}


def line(rows: list[dict[str, float]], key: str) -> dict[str, float]:
    """Least squares `key = intercept + slope * parameters`, and largest relative residual."""
    x, y = (np.array([row[k] for row in rows]) for k in ("parameters", key))
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.abs(intercept + slope * x - y) / y
    return {"slope": float(slope), "intercept": float(intercept), "max_residual": float(residual.max())}


def markdown(rows: list[dict[str, float]], fits: dict[str, dict[str, float]]) -> str:
    lines = [
        "| layers | parameters | fp16 checkpoint | export | CPU time | peak RSS | limit |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['layers']} | {row['parameters'] / 1e9:.2f} B | {row['checkpoint_bytes'] / GIB:.2f} GiB "
            f"| {row['seconds']:.1f} s | {row['cpu_seconds']:.1f} s "
            f"| {row['peak_rss'] / GIB:.2f} GiB | {row['rss_limit'] / GIB:.2f} GiB |"
        )
    seconds, rss = fits["cpu_seconds"], fits["peak_rss"]
    lines += [
        "",
        f"CPU seconds = {seconds['intercept']:.1f} + {seconds['slope'] * 1e9:.1f} per billion parameters "
        f"(largest residual {seconds['max_residual']:.0%}); peak RSS = {rss['intercept'] / GIB:.2f} GiB "
        f"+ {rss['slope'] * 1e9 / GIB:.2f} GiB per billion (largest residual {rss['max_residual']:.0%}).",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("build/export_scaling"), help="folder of the results"
    )
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: the system's")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        export_once(arguments.child, arguments.layers[0])
        return 0
    rows = [measure(layers, arguments.work) for layers in arguments.layers]
    fits = {key: line(rows, key) for key in ("seconds", "cpu_seconds", "peak_rss")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "rows": rows, "fits": fits}
    (arguments.out / "export_scaling.json").write_text(json.dumps(result, indent=2))
    print(markdown(rows, fits))
    broken = [row["layers"] for row in rows if row["peak_rss"] > row["rss_limit"]]
    if broken:
        print(f"peak RSS above its limit at {broken} layers", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
