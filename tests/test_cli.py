"""The command line: help with examples, and one clear error for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from esparse_trt.cli import app
from esparse_trt.commands.build import StageName
from esparse_trt.pipeline import STAGE_NAMES

runner = CliRunner()
GROUP = typer.main.get_command(app)
COMMANDS = [[name] for name in GROUP.commands] + [
    ["recipe", name] for name in GROUP.commands["recipe"].commands
]


def plain(text: str) -> str:
    """Without colours and line wrapping, which depend on the terminal."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_with_an_example(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    if command not in (["doctor"], ["recipe"]):
        assert f"esparse-trt {' '.join(command)}" in plain(result.output).partition("Example")[2]


def test_stage_names_in_the_help_are_those_of_the_pipeline():
    assert tuple(stage.value for stage in StageName) == STAGE_NAMES


def test_help_does_not_wait_for_torch():
    code = "import sys, esparse_trt.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_schema_is_a_json_schema_that_names_every_section():
    schema = json.loads(runner.invoke(app, ["recipe", "schema"]).output)
    assert set(schema["properties"]) >= {
        "model",
        "calibration",
        "prune",
        "export",
        "engine",
        "verify",
        "deploy",
    }


def invoke(*arguments: str):
    """Run a command that must fail as bad input: exit code 2, a fix, no traceback."""
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert "fix:" in result.output
    assert "Traceback" not in result.output
    return plain(result.output)


def test_missing_recipe(tmp_path: Path):
    assert "nowhere.yaml" in invoke("build", tmp_path / "nowhere.yaml")


def test_unknown_key_names_the_nearest(tmp_path: Path, tiny_recipe: Path):
    data = yaml.safe_load(tiny_recipe.read_text())
    data["prune"]["patern"] = data["prune"].pop("pattern")
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(data))
    message = invoke("build", bad, "--out", tmp_path / "out")
    assert "prune.patern" in message
    assert "`pattern`" in message
    assert not (tmp_path / "out").exists()


def test_report_of_a_folder_without_a_build(tmp_path: Path):
    assert str(tmp_path) in invoke("report", tmp_path)


def test_certify_of_a_file_that_is_not_there(tmp_path: Path):
    assert "gone.safetensors" in invoke("certify", tmp_path / "gone.safetensors")
