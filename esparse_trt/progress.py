"""Progress of long work: bars on a terminal, plain lines elsewhere, JSON lines for machines.

`note` and `track` are all that the stages use; `configure` is called once, by the command line, before the
libraries that draw bars of their own are imported.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
Mode = Literal["rich", "json", "silent"]

_console = Console(stderr=True)
_mode: Mode = "silent"
_json_out: TextIO | None = None  # where JSON lines go
_JSON_INTERVAL = 5.0  # seconds between progress lines of one piece of work

# Read when tqdm, huggingface_hub (whose setting transformers follows) and datasets are imported.
_NO_FOREIGN_BARS = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def configure(mode: Mode) -> None:
    """Choose how progress is shown. As a library the package is silent; the command line turns it on.

    In JSON mode every line on stderr is a JSON object: what other code writes there is wrapped in one.
    """
    global _mode, _json_out
    _mode = mode
    if mode == "json" or (mode == "rich" and not _console.is_terminal):
        os.environ.update(_NO_FOREIGN_BARS)
    if mode == "json" and not isinstance(sys.stderr, _ForeignLines):
        _json_out, sys.stderr = sys.stderr, _ForeignLines()


def note(message: str, *, style: str = "", **facts: Any) -> None:
    """Say one thing: a line on stderr in a rich style, or a JSON object with `message` and the facts."""
    if _mode == "json":
        record = {"time": round(time.time(), 3), "message": " ".join(message.split()), **facts}
        print(json.dumps(record, default=str), file=_json_out, flush=True)
    elif _mode == "rich":
        _console.print(Text(message, style), soft_wrap=True)


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "block") -> Iterator[T]:
    """Yield the items and show how far the work is, with its rate and the remaining time."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    if _mode == "rich" and _console.is_terminal:
        yield from _bar(items, what, total, unit)
    else:
        yield from _lines(items, what, total, unit)


def _bar(items: Iterable[T], what: str, total: int | None, unit: str) -> Iterator[T]:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(what, total=total, rate="")
        for done, item in enumerate(items, 1):
            yield item
            rate = done / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.2f} {unit}/s")


def _lines(items: Iterable[T], what: str, total: int | None, unit: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if _mode == "json" and (now - last >= _JSON_INTERVAL or done == total):
            last = now
            rate = done / max(now - start, 1e-9)
            left = round((total - done) / rate, 1) if total is not None else None
            note(what, done=done, total=total, unit=unit, rate=round(rate, 3), seconds_left=left)


class _ForeignLines(io.TextIOBase):
    """Stands for stderr in JSON mode: lines of other libraries (warnings, logs) become JSON objects."""

    def __init__(self) -> None:
        self._unfinished = ""

    def write(self, text: str) -> int:
        """Pass whole lines on."""
        *lines, self._unfinished = re.split(r"[\r\n]+", self._unfinished + text)
        for line in filter(str.strip, lines):
            note(line, source="stderr")
        return len(text)
