"""Dense against sparse generation of a model shape with random weights, on one GPU.

    python tests/benchmarks/generation.py llama-7b --batch 1 16 --prompt 512 4096 --out generation.json

prints decode and prefill times per cell and writes them with device, versions, memory and the distance of the
logits (esparse_trt/runtime/bench.py says how it measures).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from esparse_trt.artifacts import write_atomic
from esparse_trt.runtime import bench
from esparse_trt.runtime.shapes import NAMES, config_of


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=NAMES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 4096], help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark measures a GPU, and there is none")
    dense, sparse = bench.random_pair(config_of(options.shape), torch.float16)
    found = bench.run(
        options.shape,
        dense,
        sparse,
        batches=options.batch,
        prompts=options.prompt,
        new_tokens=options.new_tokens,
    )
    text = json.dumps(found.as_dict(), indent=1)
    print(text)
    if options.out:
        write_atomic(options.out, text + "\n")


if __name__ == "__main__":
    main()
