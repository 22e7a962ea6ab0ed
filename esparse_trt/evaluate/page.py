"""The report as one HTML page: no network, no scripts but a table sorter, light, dark and on paper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from esparse_trt.evaluate import plots
from esparse_trt.summary import plugin_use

if TYPE_CHECKING:
    from esparse_trt.evaluate.report import Report
    from esparse_trt.records import Comparison


class Check(NamedTuple):
    """A line of the list of checks; `passed` is None where the check did not run."""

    name: str
    passed: bool | None
    text: str


def render(facts: Report) -> str:
    """The page. Everything that comes from a recipe, a model or a file name is escaped."""
    environment = Environment(
        loader=PackageLoader("esparse_trt.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fixed": fixed, "percent": percent, "size": size, "tiny": tiny, "duration": duration, "count": count,
        "plural": plural,
    }  # fmt: skip
    template = environment.get_template("report.html.j2")
    return template.render(
        report=facts,
        recipe_yaml=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True),
        checks=_checks(facts),
        plots=_plots(facts),
    )


def _plots(facts: Report) -> dict[str, Markup]:
    """Drawings by name; one that has nothing to show is absent."""
    drawn: dict[str, str] = {}
    errors = {row.name: row.error for row in facts.layers if row.error and row.block is not None}
    if errors:
        drawn["error"] = plots.error_by_layer(facts.layers, errors, _block_errors(facts))
    if any(row.kept and row.block is not None for row in facts.layers):
        drawn["kept"] = plots.kept_by_layer(facts.layers)
    for number, profile in enumerate(facts.prune.channels if facts.prune else []):
        drawn[f"channels-{number}"] = plots.channels(profile, number)
    if facts.ablation and facts.ablation.rows:
        drawn["ablation"] = plots.ablation(facts.ablation)
    return {name: Markup(svg) for name, svg in drawn.items()}  # matplotlib escapes text


def _block_errors(facts: Report) -> dict[int, Comparison]:
    """Dense against sparse at the output of each decoder block, which is no linear layer."""
    linear = {row.name for row in facts.layers}
    compared = facts.verify.layers if facts.verify else []
    return {item.block: item for item in compared if item.block is not None and item.name not in linear}


def _checks(facts: Report) -> list[Check]:
    """Everything that can pass or fail, in the order in which a build meets it."""
    checks = []
    if facts.fold:
        worst = max(facts.fold.logits_error, facts.fold.dense_error)
        text = f"logits before and after folding differ by {tiny(worst)}; {_folded(facts)}"
        checks.append(Check("Folding", True, text))
    else:
        checks.append(Check("Folding", None, "stage fold has not run"))
    if facts.pack and facts.pack.bytes:
        layers = plural(sum(len(gemm.layers) for gemm in facts.pack.gemms), "layer")
        operators = plural(len(facts.pack.gemms), "SparseGemm operator")
        error = tiny(facts.pack.logits_error)
        checks.append(
            Check("Packing", True, f"{layers} in {operators}; logits differ by {error} from sparse.onnx")
        )
    else:
        reason = "no layer could be packed" if facts.pack else "stage pack has not run"
        checks.append(Check("Packing", None, reason))
    if facts.certify:
        tensors = plural(len(facts.certify.tensors), "tensor")
        text = f"{tensors} checked: {facts.certify.pattern} along K as stored"
        checks.append(Check("Certificate", True, text))
    else:
        checks.append(Check("Certificate", None, "stage certify has not run"))
    if facts.verify:
        for item in facts.verify.fidelity:
            where = "" if item.passed else f"; first over its limit: {item.first_divergence}"
            text = (
                f"{item.b} against {item.a}: logits differ by {tiny(item.logits.relative_l2)}, "
                f"limit {item.limit_logits:g}{where}"
            )
            checks.append(Check("Fidelity", item.passed, text))
    else:
        checks.append(Check("Fidelity", None, "stage verify has not run"))
    if facts.verify and facts.verify.gate is not None:
        text = f"perplexity ratio at most {fixed(facts.verify.gate, 3)}"
        checks.append(Check("Quality gate", facts.verify.gate_passed, text))
    else:
        reason = "the recipe sets none" if facts.verify else "stage verify has not run"
        checks.append(Check("Quality gate", None, reason))
    checks.append(_engine_check(facts))
    return checks


def _folded(facts: Report) -> str:
    assert facts.fold is not None
    kept = len(facts.fold.kept)
    return f"{plural(facts.fold.folded, 'permutation')} folded away, {kept} left as a Gather"


def _engine_check(facts: Report) -> Check:
    if facts.engine is None:
        return Check("Engines", None, "stage engine has not run")
    if facts.engine.skipped:
        return Check("Engines", None, facts.engine.skipped)
    built = ", ".join(
        f"{item.file} ({size(item.bytes)})" for item in (facts.engine.dense, facts.engine.sparse) if item
    )
    text = f"built by {facts.engine.flavour} {facts.engine.version}: {built}; {plugin_use(facts.engine)}"
    if facts.engine.runnable:
        return Check("Engines", True, text)
    return Check("Engines", True, f"{text}; not run here: {facts.engine.not_runnable}")


# --- figures -------------------------------------------------------------------------------------------

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
