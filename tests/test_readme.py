"""What the README tells people to type runs; `.ci/run` also runs its two set-up commands, literally."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import sysconfig
from pathlib import Path
from subprocess import run

import pytest
import yaml

from esparse_trt.estimate.check import check
from esparse_trt.evaluate import bench_text
from esparse_trt.evaluate.ablation import load_ablation
from esparse_trt.evaluate.ablation_page import markdown
from esparse_trt.evaluate.bench_record import Bench, load_bench
from esparse_trt.recipe import parse_recipe
from esparse_trt.sections import TRAFFIC

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
SHAPES = ("llama-7b", "llama-3-8b", "llama-13b")
OURS = [shlex.split(line.removeprefix(".venv/bin/")) for line in LINES if "esparse-trt " in line]


def readme_command(name: str) -> str:
    spec = importlib.util.spec_from_file_location("readme_command", ROOT / ".ci" / "readme_command.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.command(name)


def esparse_trt(*arguments: str) -> str:
    """Run the console script of this environment in the repository, where the README's paths are valid."""
    script = Path(sysconfig.get_path("scripts")) / "esparse-trt"
    done = run([script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def end_to_end(shape: str) -> Bench:
    bench = load_bench(ROOT / f"tests/benchmarks/results/{shape}-h100.json")
    assert bench is not None
    return bench


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's main command, with its folder moved out of the repository."""
    (arguments,) = (words for words in OURS if words[1] == "build" and "--dry-run" not in words)
    folder = tmp_path_factory.mktemp("readme") / "quickstart"
    printed = esparse_trt(*arguments[1:], "--out", str(folder))
    assert "perplexity" in printed
    return folder


@pytest.mark.timeout(900)
def test_the_main_command_leaves_what_the_readme_lists(quickstart: Path):
    listing = re.search(r"and leaves in `build/quickstart/`:\n\n```\n(.*?)```", README, re.S).group(1)
    names = [line.split("  ")[0].split(",")[0] for line in listing.splitlines()]
    assert len(names) >= 8
    for name in names:
        assert (quickstart / name).exists(), name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", [w for w in OURS if w[1] != "build" or "--dry-run" in w], ids=" ".join)
def test_every_other_command_runs(words: list[str], quickstart: Path):
    assert esparse_trt(*(word.replace("build/quickstart", str(quickstart)) for word in words[1:]))


def test_both_set_up_commands_install_extras_that_exist():
    extras = importlib.metadata.metadata("esparse-trt").get_all("Provides-Extra")
    for name in ("quickstart", "test"):
        (wanted,) = re.findall(r"'\.\[(.*?)\]'", readme_command(name))
        assert set(wanted.split(",")) <= set(extras)


def test_the_table_of_recipes_is_complete():
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name for name in re.findall(r"\(recipes/([\w.-]+)\.yaml\)", README)} == shipped


@pytest.mark.parametrize("model", ["quickstart", "qwen2.5-coder-0.5b"])
def test_the_tables_are_what_was_measured(model: str):
    table = load_ablation(ROOT / "recipes" / "results" / f"ablation-{model}.json")
    assert table is not None and markdown(table) in README


def test_the_page_of_results_has_every_table():
    folder = ROOT / "recipes" / "results"
    page = (folder / "README.md").read_text()
    for path in folder.glob("ablation-*.json"):
        table = load_ablation(path)
        assert table is not None and markdown(table).strip() in page, path
        assert f"({path.name})" in page


@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_to_end_tables_are_what_was_measured(shape: str):
    assert bench_text.end_to_end(end_to_end(shape)) in README


def test_the_first_screen_repeats_what_was_measured():
    first = README.partition("## Try it")[0]
    bench = end_to_end("llama-7b")
    assert f"Weights take {100 * bench.weight_saving:.1f} % less GPU memory." in first
    rows = [bench_text.cell_row(cell) for cell in bench.cells if cell.prompt == 512]
    for batch, _, tokens, gain, prefill, prefill_gain, *_, joules in rows:
        assert f"| {batch} | {tokens} | {gain} | {prefill} | {prefill_gain} | {joules} |" in first
    files = (f"ablation-qwen2.5-coder-0.5b{name}.json" for name in ("-equal", ""))
    tables = [load_ablation(ROOT / "recipes/results" / file) for file in files]
    rows = {row.name: row for table in tables for row in table.rows}
    found = {"dense": tables[-1].dense_perplexity} | {name: row.perplexity for name, row in rows.items()}
    shown = dict(re.findall(r"^\| `([^`]+)`.* \| ([\d.]+) \|$", first, re.M))
    assert len(shown) >= 3
    assert shown == {name: f"{found[name]:.2f}" for name in shown}
    trained = re.search(r"^\| `distilled`: .* (\d+) s on an H200", first, re.M)
    assert trained and trained[1] == f"{rows['distilled'].seconds:.0f}"


def test_the_errors_of_the_predictions_are_what_was_measured():
    checks = [item for shape in SHAPES for item in check(end_to_end(shape))]
    token, first = (
        max(abs(getattr(item, phase).error) for item in checks) for phase in ("decode", "prefill")
    )
    said = re.search(r"In the (\w+) cells above .*?at most (\d+) %, .*?at most (\d+) %;", README, re.S)
    assert said.groups() == ({7: "seven"}[len(checks)], f"{100 * token:.0f}", f"{100 * first:.0f}")


def test_every_recipe_is_valid():
    base = {"name": "readme", "model": {"path": "m"}, "calibration": {"text": {"path": "t"}}}
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    recipes = [parse_recipe(base | yaml.safe_load(block), base=ROOT) for block in blocks]
    assert len(recipes) >= 2 and all(recipe.traffic != TRAFFIC for recipe in recipes)


def test_the_gains_of_the_kernels_are_what_was_measured():
    page = (ROOT / "plugins/bench/results/h100_fp16.md").read_text()
    (summary,) = re.findall(r"^\| M \| shapes \|.*?(?=\n\n)", page, re.M | re.S)
    assert summary in README


def test_every_link_points_at_a_file_and_a_heading():
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", README):
        file = ROOT / target if target else ROOT / "README.md"
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


def test_no_figure_was_left_out():
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?=\s|$)", README.replace("SPARSE_WEIGHTS", ""), re.M)
