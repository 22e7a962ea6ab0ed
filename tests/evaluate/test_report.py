"""The report: the same facts on the page and in the JSON, nothing invented, nothing left unescaped."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from esparse_trt.artifacts import BuildDir, Manifest, StageEntry
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate import formats, plots
from esparse_trt.evaluate.ablation import Ablation, AblationRow
from esparse_trt.evaluate.report import Report, assemble, report, report_schema
from esparse_trt.evaluate.verify_record import Comparison, Fidelity, TaskLevel, VerifyRecord
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import (
    CertifiedTensor,
    CertifyRecord,
    ChannelProfile,
    EngineFile,
    EngineLayer,
    EngineRecord,
    ExportRecord,
    FoldRecord,
    KeptScore,
    LayerChoice,
    LayerRecord,
    PackRecord,
    PruneRecord,
    Reason,
    Record,
    SiteCost,
    TensorSpec,
)
from esparse_trt.sections import BudgetSection

SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SHAPES = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256),
          "gate_proj": (768, 256), "up_proj": (768, 256), "down_proj": (256, 768)}  # fmt: skip


def make_recipe(tmp_path: Path, **changes: object) -> Recipe:
    data = {
        "name": "quickstart",
        "description": "A small LLaMA, pruned 2:4",
        "model": {"path": "model"},
        "calibration": {"text": {"source": "file", "path": "calibration.txt"}},
        **changes,
    }
    return parse_recipe(data, base=tmp_path)


def compare(name: str, block: int | None, error: float) -> Comparison:
    return Comparison(
        name=name, block=block, max_abs=8 * error, mean_abs=error / 2, max_rel=math.inf, mean_rel=error,
        relative_l2=error, cosine=1 - error**2 / 2,
    )  # fmt: skip


def error_of(layer: LayerRecord) -> float:
    """An error that no other layer has."""
    return (0.1 + 0.03 * layer.block) * (1 + 0.1 * list(SHAPES).index(layer.name.rpartition(".")[2]))


def make_layers(blocks: int = 6) -> list[LayerRecord]:
    random = np.random.default_rng(0)
    layers = [
        LayerRecord(
            name=f"model.layers.{block}.{leaf}", site=site, block=block, shape=SHAPES[leaf.split(".")[1]],
            pattern="2:4", reason=None, permuted=True, sparsity=0.5,
            kept=KeptScore(natural=(k := 0.74 + 0.02 * random.random()), global_=k + 0.004, final=k + 0.03),
        )
        for block in range(blocks)
        for site, leaves in SITES.items()
        for leaf in leaves
    ]  # fmt: skip
    head = LayerRecord(
        name="lm_head", site="lm_head", block=None, shape=(4096, 256), pattern=None,
        reason="excluded by the recipe", permuted=False, sparsity=0.0, kept=None,
    )  # fmt: skip
    return [*layers, head]


def make_channels(site: str = "model.layers.0.mlp.down_proj") -> ChannelProfile:
    random = np.random.default_rng(1)
    channels = np.linspace(0, 767, 512).astype(int)
    score = random.gamma(2.0, 1.0, size=512)
    dealt = np.argsort(np.argsort(-score))
    return ChannelProfile(
        site=site,
        channels=channels.tolist(),
        entropy=(3 + 0.4 * random.standard_normal(512)).tolist(),
        score=score.tolist(),
        position=((dealt % 128) * 4 + dealt // 128).tolist(),
    )


def make_records() -> dict[str, Record]:
    layers = make_layers()
    pruned = [layer for layer in layers if layer.pattern]
    errors = [compare(layer.name, layer.block, error_of(layer)) for layer in pruned]
    errors += [compare(f"model.layers.{block}", block, 0.05 * (block + 1)) for block in range(6)]
    ids = TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"])
    return {
        "prune": PruneRecord(
            model_type="llama", parameters=6_000_000, dtype="float16", source_sha256="a" * 64,
            pruned_parameters=sum(n * k for n, k in (layer.shape for layer in pruned)),
            calibration_sha256="b" * 64, calibration_tokens=65536, device="cpu", layers=layers,
            channels=[make_channels(), make_channels("model.layers.5.mlp.down_proj")],
        ),
        "export": ExportRecord(
            dtype="float16", opset=20, inputs=[ids], outputs=[ids], linears={}, gathers=["g"],
            bytes={"dense": 12_000_000, "explicit": 12_010_000},
        ),
        "pack": PackRecord(
            layout="es24-v1", gemms=[], dense={}, permutations={}, logits_error=0.0, bytes=7_450_000
        ),
        "fold": FoldRecord(
            folded=12, kept={"model.layers.0.mlp.gate_proj.permute": "reads the residual stream"},
            logits_error=6e-4, dense_error=0.0, bytes=12_005_000,
        ),
        "certify": CertifyRecord(
            pattern="2:4", sha256={"onnx/sparse.onnx": "c" * 64},
            tensors=[CertifiedTensor(where="onnx", name="w", shape=[256, 256], pattern="2:4", groups=16384,
                                     sparsity=0.5)],
        ),
        "engine": EngineRecord(
            flavour="tensorrt_rtx", version="1.7.1", skipped=None, profiles={}, runnable=False, dense=None,
            not_runnable="no GPU",
            sparse=EngineFile(file="engine/sparse.plan", bytes=12_100_000, seconds=9.5, onnx_sha256={},
                              onnx="onnx/sparse.onnx", sparse_weights=True),
        ),
        "verify": VerifyRecord(
            outputs=[compare("logits", None, 0.21), compare("present.0.key", None, 0.07)],
            layers=errors, gate=1.5, gate_passed=True, task_skipped=None,
            fidelity=[Fidelity(a="pytorch", b="onnxruntime", limit_logits=5e-3, limit_layer=2e-3, layers=[],
                               logits=compare("logits", None, 7e-4), first_divergence=None, passed=True)],
            task=TaskLevel(text_sha256="d" * 64, tokens=123_392, length=256, dtype="float16",
                           runtime="pytorch", dense_perplexity=23.456, sparse_perplexity=27.891,
                           ratio=27.891 / 23.456, ln_ratio_ci95=0.01,
                           kl_divergence=0.1834, top1_agreement=0.8123),
        ),
    }  # fmt: skip


def make_manifest(recipe: Recipe, records: dict[str, Record]) -> Manifest:
    return Manifest(
        version="0.1.0",
        recipe=recipe.canonical(),
        fingerprint=recipe.fingerprint(),
        environment={"python": "3.11.7", "torch": "2.13.0", "gpu": "none"},
        stages={
            name: StageEntry(
                seconds=1.5 * (number + 1) ** 2,
                peak_rss_bytes=(number + 1) << 28,
                finished="2026-11-22T01:02:03+00:00",
                record=record.model_dump(mode="json"),
            )
            for number, (name, record) in enumerate(records.items())
        },
    )


def make_ablation() -> Ablation:
    rows = [
        AblationRow(name=name, settings=settings, perplexity=ppl, ln_ratio=math.log(ppl / 23.456),
                    ln_ratio_ci95=ci, kl=ppl / 100, top1=0.8, seconds=31.0)
        for name, settings, ppl, ci in [
            ("e_sparse", {}, 27.891, 0.004),
            ("entropy off", {"score.information": "none"}, 28.4, 0.005),
            ("global sorted", {"prune.permute.global": "sort"}, 28.2, None),
            ("magnitude", {"prune.score.method": "magnitude"}, 39.5, 0.01),
        ]
    ]  # fmt: skip
    return Ablation(model="quickstart", text="evaluation.txt", dense_perplexity=23.456, rows=rows)


@pytest.fixture
def full(tmp_path: Path) -> tuple[Recipe, BuildDir, Manifest]:
    recipe = make_recipe(tmp_path)
    folder = BuildDir(tmp_path / "build")
    folder.root.mkdir()
    folder.ablation.write_text(make_ablation().model_dump_json())
    return recipe, folder, make_manifest(recipe, make_records())


class Page(HTMLParser):
    """Text, element ids, table rows and references of a page; complains about unbalanced elements."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: set[str] = set()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [v for k in ("href", "src", "xlink:href") if (v := values.get(k))]
        self.labels |= {values["aria-labelledby"]} if values.get("aria-labelledby") else set()
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def write(recipe: Recipe, folder: BuildDir, manifest: Manifest) -> tuple[Page, dict]:
    report(recipe, folder, manifest)
    return Page(folder.report_html.read_text()), json.loads(folder.report_json.read_text())


def test_page_leads_with_the_measured_figures(full):
    html, data = write(*full)
    top = html.text.split("Ablation One model")[0]
    for shown in ("23.46", "27.89", "1.189", "0.183", "81.2", "123,392 tokens", "42 of 43 linear layers"):
        assert shown in top
    assert "ratio 1.177 to 1.201 (95 %)" in top
    pruned = 6 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 768 * 256)
    assert data["headline"]["weights_pruned"] == pytest.approx(pruned / 2 / (pruned + 4096 * 256))
    assert data["headline"]["parameters_pruned"] == pytest.approx(pruned / 2 / 6_000_000)
    assert data["headline"]["packed_onnx_bytes"] == 7_450_000
    assert "packed.onnx takes 7.1 MiB" in top
    assert "0 SparseGemm operators; logits differ by 0 from sparse.onnx" in top


def test_json_follows_its_schema_and_reads_back(full):
    recipe, folder, manifest = full
    _, data = write(recipe, folder, manifest)
    schema = report_schema()
    assert set(data) == set(schema["properties"]) == set(schema["required"])
    assert data["schema_version"] == 1
    assert Report.model_validate(data) == assemble(recipe, folder, manifest)
    assert data["verify"]["outputs"][0]["max_rel"] == "Infinity"  # strict JSON has no literal for it


def test_every_layer_is_a_row_with_its_own_error(full):
    html, data = write(*full)
    rows = {row[0]: row for row in html.rows if row and row[0].startswith(("model.layers.", "lm_head"))}
    assert len(data["layers"]) == 43
    for layer in data["layers"]:
        shown = rows[layer["name"]]
        assert shown[1] == layer["site"]
        assert shown[2] == f"{layer['shape'][0]} × {layer['shape'][1]}"
        if layer["pattern"]:
            assert shown[8] == formats.tiny(
                error_of(LayerRecord(**{k: v for k, v in layer.items() if k != "error"}))
            )
            assert float(shown[7]) == pytest.approx(layer["kept"]["final"], abs=1e-4)
        else:
            assert shown[3] == "dense: excluded by the recipe"
            assert shown[5:] == [formats.ABSENT] * 5


def test_a_choice_of_layers_is_listed_with_its_reasons(full):
    recipe, folder, _ = full
    sites = [
        SiteCost(site="model.layers.0.mlp.down_proj", layers=["model.layers.0.mlp.down_proj"],
                 parameters=196_608, kept=0.9123, nats=0.4567, nats_4_8=0.1234, gain=0.031, pattern=pattern,
                 reason=reason)
        for pattern, reason in (("2:4", None), (None, "prune.budget: its site costs 0.4567 nats"))
    ]  # fmt: skip
    choice = LayerChoice(ln_ratio=0.321, speedup=1.357, speed_of="bytes of weights", sites=sites)
    budget = BudgetSection(perplexity_ratio=1.4, speedup=1.3, sensitive="4:8")
    section = recipe.prune.model_copy(update={"budget": budget})
    recipe = recipe.model_copy(update={"prune": section})
    records = make_records()
    records["prune"] = records["prune"].model_copy(update={"choice": choice})
    html, data = write(recipe, folder, make_manifest(recipe, records))
    assert data["prune"]["choice"]["sites"][1]["pattern"] is None
    assert "perplexity at most 1.4, linear layers at least 1.3 times as fast" in html.text
    assert "ln ratio 0.3210, speed-up 1.357 (bytes of weights)" in html.text
    rows = [row for row in html.rows if row and row[0] == "model.layers.0.mlp.down_proj" and "0.4567" in row]
    assert [row[7] for row in rows] == ["2:4", "dense"]
    assert rows[1][2:7] == ["0.9123", "0.4567", "0.1234", "2.3229", "3.1 %"] and "costs 0.4567" in rows[1][8]


@pytest.mark.parametrize("missing", ["prune", "export", "fold", "certify", "engine", "verify"])
def test_missing_stages_are_named_and_not_faked(full, missing):
    recipe, folder, _ = full
    records = make_records()
    del records[missing]
    html, data = write(recipe, folder, make_manifest(recipe, records))
    assert data["missing"] == [missing]
    assert data[missing] is None
    assert f"This build is not finished. Not run yet: {missing} ." in html.text
    if missing == "verify":
        assert all(row["error"] is None for row in data["layers"])
        assert data["headline"]["dense_perplexity"] is None
        assert "23.46" not in html.text.split("Ablation One model")[0]


def test_a_build_that_did_nothing_yet_has_a_page(tmp_path):
    recipe = make_recipe(tmp_path)
    html, data = write(recipe, BuildDir(tmp_path / "build"), make_manifest(recipe, {}))
    assert "Nothing has been pruned yet" in html.text
    assert set(data["headline"].values()) == {None}


def test_failed_checks_stand_out(full):
    recipe, folder, _ = full
    records = make_records()
    verify = records["verify"]
    broken = verify.fidelity[0].model_copy(
        update={"passed": False, "first_divergence": "model.layers.3.mlp.up_proj"}
    )
    records["verify"] = verify.model_copy(update={"fidelity": [broken], "gate": 1.1, "gate_passed": False})
    html, data = write(recipe, folder, make_manifest(recipe, records))
    assert data["headline"]["fidelity_passed"] is False
    assert "Fidelity failed." in html.text
    assert "first over its limit: model.layers.3.mlp.up_proj" in html.text
    assert "Quality gate failed." in html.text


def test_an_engine_that_was_only_built_has_not_passed(full):
    recipe, folder, manifest = full
    html, _ = write(recipe, folder, manifest)
    assert "not run: engines" in html.text
    records = make_records()
    records["engine"] = records["engine"].model_copy(update={"runnable": True, "not_runnable": None})
    html, _ = write(recipe, folder, make_manifest(recipe, records))
    assert "not run: engines" not in html.text


def test_everything_foreign_is_escaped(full, tmp_path):
    evil = "<script>alert('x')</script>&\"<b>"
    recipe = make_recipe(tmp_path, description=evil, report={"title": evil})
    records = make_records()
    layers = [
        layer.model_copy(update={"name": evil + layer.name, "site": evil, "reason": evil})
        for layer in records["prune"].layers
    ]
    profile = make_channels(evil)
    records["prune"] = records["prune"].model_copy(update={"layers": layers, "channels": [profile]})
    layer = EngineLayer(name=evil, kernel="plugin", code=Reason.faster, choices=evil, reason=evil)
    sparse = records["engine"].sparse.model_copy(update={"layers": [layer]})
    changes = {"not_runnable": evil, "no_plugin": evil, "sparse": sparse}
    records["engine"] = records["engine"].model_copy(update=changes)
    table = make_ablation()
    named = [row.model_copy(update={"name": evil + row.name, "settings": {evil: evil}}) for row in table.rows]
    _, folder, _ = full
    folder.ablation.write_text(table.model_copy(update={"rows": named, "text": evil}).model_dump_json())
    manifest = make_manifest(recipe, records).model_copy(update={"environment": {evil: evil}})
    html, _ = write(recipe, folder, manifest)
    source = folder.report_html.read_text()
    assert source.count("<script") == 1
    assert "<b>" not in source
    assert evil in html.text


def test_page_is_self_contained_and_its_ids_are_unique(full):
    html, _ = write(*full)
    assert html.links
    assert all(link.startswith("#") for link in html.links)
    assert len(html.ids) == len(set(html.ids))
    assert {link[1:] for link in html.links} <= set(html.ids)
    assert len(html.labels) == 5
    assert html.labels <= set(html.ids)  # every drawing has its caption
    assert not re.search(r"@import|url\((?!#)", full[1].report_html.read_text())


def test_same_facts_give_the_same_bytes(full):
    recipe, folder, manifest = full
    report(recipe, folder, manifest)
    first = folder.report_html.read_bytes(), folder.report_json.read_bytes()
    report(recipe, folder, manifest)
    assert (folder.report_html.read_bytes(), folder.report_json.read_bytes()) == first


def test_drawings_are_xml_in_the_colours_of_the_page():
    svg = plots.channels(make_channels(), 0)
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.tag.endswith("svg")
    assert "var(--series-1)" in svg
    assert not re.search(r"#0a0[ab]0\d", svg)
    texts = {node.text for node in root.iter() if node.tag.endswith("text")}
    assert {"mean score", "entropy, nats", "before: original order"} <= texts
    # all 512 points of a panel are one path, not 512 elements
    assert max(path.get("d", "").count("M") for path in root.iter() if path.tag.endswith("path")) >= 512


def test_wrong_ablation_file_and_foreign_record_are_clear_errors(full):
    recipe, folder, manifest = full
    folder.ablation.write_text('{"rows": 3}')
    with pytest.raises(EsparseError, match="not an ablation table") as error:
        report(recipe, folder, manifest)
    assert str(folder.ablation) in str(error.value)
    folder.ablation.unlink()
    entry = manifest.stages["fold"].model_copy(update={"record": {"folded": 3}})
    broken = manifest.model_copy(update={"stages": manifest.stages | {"fold": entry}})
    with pytest.raises(EsparseError, match="stage `fold`"):
        report(recipe, folder, broken)
    assert not folder.report_html.exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.25, "0.250"),
        (1234.5, "1.2e3"),
        (6.2e-4, "6.2e−4"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_small_errors_are_readable(value, text):
    assert formats.tiny(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512 B"), (1024, "1.0 KiB"), (12 << 20, "12.0 MiB"), (3 << 30, "3.00 GiB"), (5 << 40, "5.00 TiB")],
)
def test_sizes_are_binary(value, text):
    assert formats.size(value).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3720, "1 h 02 min")]
)
def test_durations_are_for_people(value, text):
    assert formats.duration(value).replace("\N{NO-BREAK SPACE}", " ") == text
