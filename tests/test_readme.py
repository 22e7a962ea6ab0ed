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

from esparse_trt.evaluate import bench_text
from esparse_trt.evaluate.ablation import load_ablation
from esparse_trt.evaluate.ablation_page import markdown
from esparse_trt.evaluate.bench_record import load_bench

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
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


@pytest.mark.parametrize("shape", ["llama-7b", "llama-3-8b", "llama-13b"])
def test_the_end_to_end_tables_are_what_was_measured(shape: str):
    bench = load_bench(ROOT / f"tests/benchmarks/results/{shape}-h100.json")
    assert bench is not None
    for table in (bench_text.end_to_end(bench), bench_text.predictions(bench)):
        assert table.split("\n\n")[-1].strip() in README


def test_the_gains_of_the_kernels_are_what_was_measured():
    page = (ROOT / "plugins/bench/results/h100_fp16.md").read_text()
    (summary,) = re.findall(r"^\| M \| shapes \|.*?(?=\n\n)", page, re.M | re.S)
    assert summary in README


def test_every_link_points_at_a_file():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_figure_was_left_out():
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?=\s|$)", README.replace("SPARSE_WEIGHTS", ""), re.M)
