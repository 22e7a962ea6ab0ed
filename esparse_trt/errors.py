"""Errors a user can act on: what went wrong, where, and how to fix it."""

from __future__ import annotations

from os import PathLike


class EsparseError(Exception):
    """Bad input or an environment that cannot do what was asked. The command line exits with code 2.

    Args:
        what: what is wrong, with the actual value.
        where: the file, recipe key, layer or tensor it is wrong in.
        fix: what the user can do about it.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | PathLike[str] | None = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class CheckFailed(EsparseError):
    """The input was fine but the result is not: a certificate, a fidelity check or a quality gate failed.

    The command line exits with code 1 and every artifact written so far is kept.
    """

    exit_code = 1
