"""What TensorRT says while it works goes to a file, so that a user can read why."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def captured(path: Path | None) -> Iterator[list[str]]:
    """Send the messages of Polygraphy and TensorRT (INFO and above) to `path` instead of the terminal.

    Yields the list of error messages, filled as they come. `path` none keeps only those.
    """
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []
    sink = logging.getLogger("Polygraphy")
    handler = _Collect(errors)
    saved = (sink.propagate, sink.level, G_LOGGER.use_python_logging_system, G_LOGGER.colors)
    sink.propagate = False
    sink.setLevel(1)
    sink.addHandler(handler)
    G_LOGGER.use_python_logging_system = True  # else it prints to stdout
    G_LOGGER.colors = False
    G_LOGGER.once_logged.clear()  # a warning that the dense build gave belongs into the sparse one's log too
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        G_LOGGER.log_file = str(path)
    try:
        with G_LOGGER.verbosity(G_LOGGER.VERBOSE):  # the level of TensorRT's INFO
            yield errors
    finally:
        sink.removeHandler(handler)
        sink.propagate, sink.level, G_LOGGER.use_python_logging_system, G_LOGGER.colors = saved
        if path is not None:
            G_LOGGER.log_file = None


def gist(errors: list[str], conclusion: Exception) -> str:
    """The first and the last of several error messages: what happened, and what TensorRT made of it.

    Args:
        errors: as collected; Polygraphy's own `conclusion` is among them and says less than the rest.
        conclusion: the exception that ended the work.
    """
    said = [text for text in dict.fromkeys(errors) if text != str(conclusion)] or [str(conclusion)]
    return "; ".join(dict.fromkeys([said[0], said[-1]]))


class _Collect(logging.Handler):
    """Keeps the text of error messages, without Polygraphy's severity prefix."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        text = record.getMessage().strip()
        self.errors.append(text.partition("] ")[2] if text.startswith("[") else text)
