"""How figures are written on the pages, and the environment of their templates."""

from __future__ import annotations

import math

from jinja2 import Environment, PackageLoader, StrictUndefined

ABSENT = "\N{EN DASH}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A decimal fraction with a fixed number of digits."""
    return ABSENT if value is None else _special(value) or f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return ABSENT if value is None else _special(value) or f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def tiny(value: float | None) -> str:
    """A small error: three significant digits, in scientific notation where that is shorter."""
    if value is None:
        return ABSENT
    if special := _special(value):
        return special
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:#.3g}".rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")


def size(value: int | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return ABSENT
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2), ("TiB", 2)):
        scaled = value / 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
        if scaled < 1024 or unit == "TiB":
            return f"{scaled:.{digits}f}\N{NO-BREAK SPACE}{unit}"
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\N{NO-BREAK SPACE}min {rest:02d}\N{NO-BREAK SPACE}s"
    return f"{minutes // 60}\N{NO-BREAK SPACE}h {minutes % 60:02d}\N{NO-BREAK SPACE}min"


def count(value: int | None) -> str:
    """A whole number in groups of three digits; parameters in millions or billions."""
    if value is None:
        return ABSENT
    for limit, unit in ((10**9, "B"), (10**6, "M")):
        if value >= limit:
            return f"{value / limit:.2f}\N{NO-BREAK SPACE}{unit}"
    return f"{value:,}"


def plural(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _special(value: float) -> str | None:
    if math.isnan(value):
        return "NaN"
    return ("\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}") if math.isinf(value) else None


def environment() -> Environment:
    """Of all pages. Everything that comes from a recipe, a model or a file name is escaped."""
    made = Environment(
        loader=PackageLoader("esparse_trt.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "fixed": fixed, "percent": percent, "size": size, "tiny": tiny, "duration": duration, "count": count,
        "plural": plural,
    }  # fmt: skip
    return made
