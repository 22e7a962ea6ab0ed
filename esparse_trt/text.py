"""Text as token windows: what the scores are measured on, and what perplexity is measured on.

Protocol, the same for every source:

1. Text is tokenised without special tokens, in pieces of about 64 Ki characters that end at a line end, so
   that time and memory stay linear in the text. Documents are joined into one stream, an EOS token after each
   where the tokenizer has one. A file is one document; so is a data set with `rows: lines`, whose rows are
   joined by blank lines as is the custom for WikiText-2.
2. A window is BOS, where the tokenizer has one, and then consecutive tokens of the stream, `length` tokens
   in all. Every window starts with BOS because a model meets its texts that way; the customary WikiText-2
   figures have BOS in the first window only, or not at all, and differ from ours in the third digit.
3. Calibration takes `samples` windows in random places, never overlapping, by seed. Of a data set as many
   rows are read as hold four times the tokens needed; independent rows of a data set that is not streamed
   are shuffled first, by the same seed.
4. Evaluation takes consecutive windows from the start and drops the last, partial one.

`source: self` has no text: the model samples it token by token from its own distribution, starting from BOS
and going on after EOS, as in the packed sequences that it was trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esparse_trt.errors import EsparseError
from esparse_trt.progress import track
from esparse_trt.sections import TextDataset, TextFile, TextSelf

_PIECE = re.compile(r".{65536,131072}?\n(?=\S)|.{1,65536}", re.DOTALL)
_OVERSAMPLING = 4  # of a data set, read this many times the tokens that calibration needs
_SELF_BATCH = 16  # sequences sampled at a time


def token_windows(
    source: TextFile | TextDataset | TextSelf,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    model: PreTrainedModel | None = None,
    key: str = "calibration",
) -> torch.Tensor:
    """Calibration or training text: int64 token ids `[samples, length]`, the same for the same seed.

    Args:
        source: where the text comes from.
        tokenizer: the model's tokenizer.
        samples: number of windows.
        length: tokens per window, BOS included.
        seed: of the choice of windows, or of sampling.
        model: the dense model; needed by `source: self` only.
        key: recipe section that asks for it.

    Raises:
        EsparseError: text missing, unreadable, empty or too short; gives the tokens there are and are needed.
    """
    if isinstance(source, TextSelf):
        if model is None:
            raise ValueError("`source: self` samples from the model: pass it")
        return _sample(model, tokenizer, source.temperature, samples=samples, length=length, seed=seed)
    prefix = _prefix(tokenizer)
    body = length - len(prefix)
    needed = samples * body
    limit = None if isinstance(source, TextFile) else _OVERSAMPLING * needed
    stream = _stream(source, tokenizer, limit=limit, shuffle_seed=seed)
    if len(stream) < needed:
        raise EsparseError(
            f"the text of {key} has {len(stream)} tokens; {samples} samples of {length} need {needed}",
            where=_where(source),
            fix=f"use a longer text, or {key}.samples: {len(stream) // body or 1} at most",
        )
    generator = torch.Generator().manual_seed(seed)
    spare = len(stream) % body
    start = int(torch.randint(spare + 1, (1,), generator=generator))
    slots = stream[start : start + len(stream) - spare].view(-1, body)
    chosen = slots[torch.randperm(len(slots), generator=generator)[:samples]]
    return _with_prefix(chosen, prefix)


def evaluation_windows(
    source: TextFile | TextDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    samples: int | None = None,
) -> torch.Tensor:
    """Evaluation text: int64 token ids `[n, length]`, consecutive windows, `samples` of them at most.

    Raises:
        EsparseError: text missing, unreadable, empty or shorter than one window.
    """
    prefix = _prefix(tokenizer)
    body = length - len(prefix)
    stream = _stream(source, tokenizer, limit=samples * body if samples else None)
    count = len(stream) // body
    if count == 0:
        raise EsparseError(
            f"the evaluation text has {len(stream)} tokens; one window of {length} needs {body}",
            where=_where(source),
            fix=f"use a longer text, or verify.length: {max(len(stream), 8)} or less",
        )
    count = min(count, samples or count)
    return _with_prefix(stream[: count * body].view(count, body), prefix)


def tokens_sha256(ids: torch.Tensor) -> str:
    """SHA-256 over token ids as little-endian int64."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def require_readable(source: TextFile | TextDataset | TextSelf | None) -> None:
    """Find a wrong path before hours of work; whether a text is long enough only its tokens tell.

    Raises:
        EsparseError: a text file that is missing, not UTF-8 or blank.
    """
    if isinstance(source, TextFile) and not _read_file(source).strip():
        raise _empty(source)


# --- tokens --------------------------------------------------------------------------------------------


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _with_prefix(windows: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    start = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), len(prefix))
    return torch.cat([start, windows.long()], dim=1)


def _stream(
    source: TextFile | TextDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    shuffle_seed: int | None = None,
) -> torch.Tensor:
    """The text as one int32 token stream [T]; reading stops once `limit` tokens are there."""
    if isinstance(source, TextFile):
        documents: Iterable[Iterable[str]] = [[_read_file(source)]]
    else:
        rows = _rows(source, shuffle_seed)
        documents = ([row] for row in rows) if source.rows == "documents" else [_joined(rows)]
    pieces, total = [], 0
    for ids in track(_tokenised(documents, tokenizer), "tokenising", unit="piece"):
        pieces.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
        if limit is not None and total >= limit:
            break
    if total == 0:
        raise _empty(source)
    return torch.cat(pieces)


def _tokenised(documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids piece by piece; each document that is not blank is followed by EOS where there is one."""
    for document in documents:
        blank = True
        for text in document:
            for piece in _PIECE.findall(text):
                if piece.strip() or not blank:
                    blank = False
                    yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if not blank and tokenizer.eos_token_id is not None:
            yield [tokenizer.eos_token_id]


def _joined(rows: Iterable[str]) -> Iterator[str]:
    """Rows as one text with blank lines between them, in pieces that are long enough to tokenise well."""
    pending: list[str] = []
    size = 0
    for row in rows:
        pending.append(row + "\n\n")
        size += len(row)
        if size >= 1 << 16:
            yield "".join(pending)
            pending, size = [], 0
    if pending:
        yield "".join(pending).removesuffix("\n\n")


# --- sources -------------------------------------------------------------------------------------------


def _where(source: TextFile | TextDataset) -> str:
    if isinstance(source, TextFile):
        return str(source.path)
    return " ".join(part for part in (source.name, source.config, source.split) if part)


def _empty(source: TextFile | TextDataset) -> EsparseError:
    return EsparseError("the text is empty", where=_where(source), fix="name a text that has some words")


def _read_file(source: TextFile) -> str:
    try:
        return source.path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        what = f"cannot read the text: {error.strerror}"
        raise EsparseError(what, where=source.path, fix="correct the path of the text") from error
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        fix = f"convert it, for example: iconv -f latin1 -t utf-8 {source.path.name}"
        raise EsparseError(what, where=source.path, fix=fix) from error


def _rows(source: TextDataset, shuffle_seed: int | None) -> Iterator[str]:
    """The text column, row by row."""
    dataset = _open_dataset(source)
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may know none beforehand
    if source.column not in columns:
        what = f"the data set has no column {source.column!r}; it has {', '.join(columns) or 'none'}"
        raise EsparseError(what, where=_where(source), fix="set `column` to the one that holds the text")
    dataset = dataset.select_columns(source.column)
    if shuffle_seed is not None and source.rows == "documents" and not source.streaming:
        dataset = dataset.shuffle(seed=shuffle_seed)
    if source.documents is not None:
        dataset = dataset.take(source.documents)
    for number, row in enumerate(dataset):
        text = row[source.column]
        if not isinstance(text, str):
            what = f"column {source.column!r} holds {type(text).__name__}, not text, in row {number}"
            raise EsparseError(what, where=_where(source), fix="set `column` to the one that holds the text")
        yield text


def _open_dataset(source: TextDataset) -> Any:
    import datasets  # slow to import, and most builds read a file
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return datasets.load_dataset(
            source.name,
            source.config,
            split=source.split,
            data_files=source.data_files,
            streaming=source.streaming,
            verification_mode="no_checks" if source.data_files else None,  # a part of the data is fine
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        fix = "connect to the network (unset HF_HUB_OFFLINE; a gated data set needs `hf auth login`) "
        fix += "or use local files: `name: json` (text, parquet) with `data_files`"
        raise EsparseError(f"cannot load the data set: {error}", where=_where(source), fix=fix) from error
    except (DatasetsError, OSError, ValueError) as error:
        fix = "check `name`, `config`, `split` and `data_files` of the text"
        raise EsparseError(f"cannot load the data set: {error}", where=_where(source), fix=fix) from error


# --- the model's own text ------------------------------------------------------------------------------


@torch.inference_mode()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    *,
    samples: int,
    length: int,
    seed: int,
) -> torch.Tensor:
    """Sequences sampled from the model with a KV cache, `_SELF_BATCH` at a time."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        what = "the tokenizer has neither BOS nor EOS, so there is nothing to start sampling from"
        raise EsparseError(what, where="calibration.text", fix="use `source: file` or `source: dataset`")
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(_SELF_BATCH, samples - done) for done in range(0, samples, _SELF_BATCH)]
    steps = [(size, step) for size in sizes for step in range(length - 1)]
    batches: list[torch.Tensor] = []
    for size, step in track(steps, "sampling calibration text", unit="step"):
        if step == 0:
            ids, cache = torch.full((size, 1), first), None
        output = model(ids[:, -1:].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu() / temperature
        if not torch.isfinite(logits).all():
            what = f"the model's logits are NaN or Inf after {step + 1} tokens of its own text"
            raise EsparseError(what, where="calibration.text", fix="check the weights, or load them in fp32")
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        if step == length - 2:
            batches.append(ids)
    return torch.cat(batches)
