"""Where the model and the texts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from esparse_trt.sections.base import Section


class ModelSection(Section):
    """Where the dense model comes from: exactly one of `path` and `hub`."""

    path: Path | None = Field(None, description="Local Hugging Face folder, or a .gguf file")
    hub: str | None = Field(None, description="Hugging Face hub id, such as Qwen/Qwen2.5-0.5B")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository")
    tokenizer: Path | None = Field(None, description="Tokenizer folder, when it does not lie with the model")
    trust_remote_code: bool = Field(False, description="Run Python code that the hub repository ships")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` (a folder or .gguf file) and `hub` (a hub id)")
        return self


class TextFile(Section):
    """Plain UTF-8 text, cut into windows of equal length."""

    source: Literal["file"] = "file"
    path: Path = Field(description="A UTF-8 text file")


BUILDERS = ("json", "text", "csv", "parquet")  # of the datasets library: they read local files or URLs


class TextDataset(Section):
    """A data set loaded through the `datasets` library."""

    source: Literal["dataset"]
    name: str = Field(description="Hub id, folder of a copy, or builder: allenai/c4, /data/c4, json, text")
    config: str | None = Field(None, description="Configuration of the data set, such as wikitext-2-raw-v1")
    split: str = Field("train", description="Split to read")
    column: str = Field("text", description="Column that holds the text")
    rows: Literal["documents", "lines"] = Field(
        "documents", description="documents: each row is a text of its own; lines: all rows are one text"
    )
    data_files: list[str] | None = Field(
        None, description="Files inside the data set; of a builder, local files"
    )
    streaming: bool = Field(False, description="Read only as much of the data set as is needed")
    documents: int | None = Field(None, ge=1, description="Read at most this many rows")


class TextSelf(Section):
    """Text that the model writes itself by sampling from its own distribution, starting from BOS."""

    source: Literal["self"]
    temperature: float = Field(1.0, gt=0, description="Sampling temperature")


def _file_by_default(value: Any) -> Any:
    return {"source": "file", **value} if isinstance(value, dict) else value


TextSource = Annotated[
    TextFile | TextDataset | TextSelf, Field(discriminator="source"), BeforeValidator(_file_by_default)
]
EvaluationSource = Annotated[
    TextFile | TextDataset, Field(discriminator="source"), BeforeValidator(_file_by_default)
]


class CalibrationSection(Section):
    """The text that the scores are measured on."""

    text: TextSource
    samples: int = Field(128, ge=1, description="Number of sequences")
    length: int = Field(2048, ge=8, description="Tokens per sequence")
    seed: int = Field(0, ge=0, description="Seed of the choice of windows and of sampling")
    batch_size: int = Field(8, ge=1, description="Sequences that pass through a block at a time")
