"""The results of a benchmark as a table of the tuner: the reference that this package ships.

    cd plugins/bench
    python to_table.py results/h100_fp16.json ../../esparse_trt/engine/tables/h100.json

`dense` is then cuBLASLt's best of 8 algorithms, where the tuner has torch's choice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from esparse_trt.engine.table import Best, Device, Row, Table

KINDS = {"plain": "ours", "programmatic": "ours_pdl", "dense": "dense"}


def convert(results: dict[str, Any]) -> Table:
    """The same cells as rows."""
    environment, library = results["environment"], results["environment"]["library"]
    table = Table(
        Device(**environment["device"]), library["version"], library["kernel_set"], environment["date"]
    )
    for cell in results["cells"]:
        best = {kind: _best(cell[name], kind) for kind, name in KINDS.items()}
        row = Row(cell["n"], cell["k"], cell["dtype"], cell["m"], **best)
        table.rows[row.key] = row
    return table


def _best(found: dict[str, Any], kind: str) -> Best:
    kernel = f"cublasLt, algorithm {found['key']}" if kind == "dense" else found["key"]
    return Best(kernel, found["us"], found["p10"], found["p90"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of bench.py")
    parser.add_argument("table", type=Path, help="to write")
    options = parser.parse_args()
    convert(json.loads(options.results.read_text())).save(options.table)


if __name__ == "__main__":
    main()
