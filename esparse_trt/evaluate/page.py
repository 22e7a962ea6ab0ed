"""The report as one HTML page: no network, no scripts but a table sorter, light, dark and on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import yaml
from markupsafe import Markup

from esparse_trt.estimate.check import check
from esparse_trt.evaluate import ablation_page, bench_text, plots
from esparse_trt.evaluate.formats import environment, fixed, plural, size, tiny
from esparse_trt.summary import plugin_use

if TYPE_CHECKING:
    from esparse_trt.evaluate.report import Report
    from esparse_trt.evaluate.verify_record import Comparison


class Check(NamedTuple):
    """A line of the list of checks; `passed` is None where it did not run, as of an engine only built."""

    name: str
    passed: bool | None
    text: str


def render(facts: Report) -> str:
    """The page. Everything that comes from a recipe, a model or a file name is escaped."""
    template = environment().get_template("report.html.j2")
    return template.render(
        report=facts,
        recipe_yaml=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True),
        checks=_checks(facts),
        plots=_plots(facts),
        ablation=ablation_page.facts(facts.ablation) if facts.ablation else None,
        predicted=check(facts.bench) if facts.bench else [],
        speed=[*bench_text.findings(facts.bench), *bench_text.facts(facts.bench)] if facts.bench else [],
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
    if facts.bench and facts.bench.cells:
        drawn["crossover"] = plots.crossover(facts.bench)
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
    return Check("Engines", None, f"{text}; not run here: {facts.engine.not_runnable}")
