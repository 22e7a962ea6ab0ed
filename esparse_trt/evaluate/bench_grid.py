"""Which batches and prompts a benchmark covers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from esparse_trt.errors import EsparseError

LARGEST_LAYER_M = 8192  # tokens of a GEMM in the table of layers


@dataclass(frozen=True)
class Grid:
    """What to measure: every batch with every prompt length, and `generated` tokens after each prompt."""

    batches: tuple[int, ...] = (1, 4, 16, 64)
    prompts: tuple[int, ...] = (128, 512, 2048, 8192)
    generated: int = 128

    def options(self) -> str:
        """As typed."""
        batches, prompts = (",".join(map(str, numbers)) for numbers in (self.batches, self.prompts))
        return f"--batch {batches} --prompt {prompts} --generated {self.generated}"

    def layer_tokens(self) -> set[int]:
        """Numbers of tokens of the layers' GEMMs: decoding a batch, and reading one prompt."""
        return {m for m in (*self.batches, *self.prompts) if m <= LARGEST_LAYER_M}


def parse_numbers(text: str, where: str, least: int, most: int) -> tuple[int, ...]:
    """Ascending numbers from "1,16,64".

    Raises:
        EsparseError: it is not such a list, or a number is out of range.
    """
    parts: Iterable[str] = text.replace(" ", "").split(",")
    if not all(part.isdigit() and least <= int(part) <= most for part in parts):
        raise EsparseError(
            f"{text!r} is not a list of numbers from {least} to {most}", where=where, fix="write 1,16,64"
        )
    return tuple(sorted({int(part) for part in parts}))
