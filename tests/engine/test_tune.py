"""The tuning table, the search of the tuner, and what is decided from them; on a GPU that is played."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esparse_trt import tuning
from esparse_trt.cli import app
from esparse_trt.engine import table as tables
from esparse_trt.engine import timing, tune
from esparse_trt.engine.kernels import Problem
from esparse_trt.engine.table import BUCKETS, Device, Row, Table, choices, decide, load_table, usable_table
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import load_recipe
from esparse_trt.sections import EngineSection

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
H100 = Device("NVIDIA H100 80GB HBM3", 90, 132, "580.95", "13.0")


def row(m, us, dense_us, n=4096, k=4096, candidate="decode_a"):
    return Row(n, k, "float16", m, candidate, us, us, us, dense_us, dense_us, dense_us)


def make_table(*rows, device=H100, kernel_set="abc123"):
    return Table(device, "0.1.0", kernel_set, {r.key: r for r in rows})


# --- the file ----------------------------------------------------------------------------------------------


def test_a_table_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "table.json"
    table = make_table(row(1, 7.5, 14.0), row(16, 9.0, 15.0), row(1, 3.0, 2.0, n=64))
    table.save(path)
    assert load_table(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a tuning table"),
        ("[]", "not a tuning table"),
        ('{"schema": 7}', "schema 7"),
        ('{"schema": 1, "device": {}, "rows": []}', "not a tuning table"),
        ('{"schema": 1, "rows": [{"n": 1}]}', "not a tuning table"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path, text, words):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(EsparseError, match=words) as error:
        load_table(path)
    assert error.value.where == str(path)


def test_the_default_place_is_the_users_cache_one_file_per_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.default_path(H100.name) == tmp_path / "esparse-trt/tune/nvidia-h100-80gb-hbm3.json"


# --- foreign tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel_set", "device", "words"),
    [
        ("other", H100, "measured with the kernels abc123"),
        ("abc123", replace(H100, name="NVIDIA A100"), "measured on NVIDIA H100"),
        ("abc123", replace(H100, multiprocessors=114), "132 multiprocessors, this GPU .* 114"),
    ],
)
def test_a_foreign_table_is_not_used_and_a_warning_says_why(monkeypatch, tmp_path, kernel_set, device, words):
    said = []
    monkeypatch.setattr(tables, "note", lambda message, **facts: said.append(message))
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0)).save(path)
    assert usable_table(path, kernel_set, device) is None
    (message,) = said
    assert re.search(words, message)
    assert "static heuristic" in message and "esparse-trt tune" in message


def test_another_driver_is_the_same_gpu_and_no_gpu_at_all_is_taken_on_trust(tmp_path):
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0)).save(path)
    assert usable_table(path, "abc123", replace(H100, driver="999", cuda="14.0")) is not None
    assert usable_table(path, "abc123", None) is not None


def test_a_table_that_is_not_there_is_none(tmp_path):
    assert usable_table(tmp_path / "none.json", "abc123", H100) is None


def test_the_tuner_does_not_overwrite_another_gpus_table_but_starts_anew_for_other_kernels(tmp_path):
    path = tmp_path / "table.json"
    make_table(row(1, 7.5, 14.0), device=replace(H100, name="NVIDIA A100")).save(path)
    with pytest.raises(EsparseError, match="measured on NVIDIA A100"):
        tune.open_table(path, Library(), H100)
    make_table(row(1, 7.5, 14.0), kernel_set="old").save(path)
    assert tune.open_table(path, Library(), H100).rows == {}
    make_table(row(1, 7.5, 14.0)).save(path)
    assert len(tune.open_table(path, Library(), H100).rows) == 1


# --- what it is used for -----------------------------------------------------------------------------------


def test_choices_are_the_plugins_field_in_ascending_order():
    table = make_table(row(64, 9, 15, candidate="wgmma_b"), row(1, 7, 14), row(16, 8, 14), row(1, 1, 1, n=8))
    assert choices(table, 4096, 4096, "float16") == "1=decode_a,16=decode_a,64=wgmma_b"
    assert choices(table, 4096, 4096, "bfloat16") is None
    assert choices(None, 4096, 4096, "float16") is None


@pytest.mark.parametrize(
    ("tokens", "sparse", "code", "words"),
    [
        ([1, 512], True, "faster", "M = 1: 7.0 us sparse, 14.0 us dense (x2.00)"),
        ([300], True, "faster", "M = 300: 20.0 us sparse, 26.0 us dense"),
        ([64, 65], False, "dense_faster", "nothing is faster than dense: M = 64"),
        ([1, 64], True, "mixed", "sparse is faster in the mean"),
        ([128, 512], False, "mixed", "dense is faster in the mean"),
        ([1, 4096], True, "not_measured", "was not measured at M = 4096"),
    ],
)
def test_a_layer_is_sparse_or_dense_with_the_reason(tokens, sparse, code, words):
    table = make_table(row(1, 7.0, 14.0), row(64, 16.0, 15.0), row(128, 40.0, 20.0), row(512, 20.0, 26.0))
    decision = decide(table, 4096, 4096, "float16", tokens)
    assert (decision.sparse, decision.code) == (sparse, code)
    assert words in decision.reason


def test_without_a_table_a_layer_is_sparse_and_the_reason_says_how_to_measure():
    decision = decide(None, 4096, 4096, "float16", [1])
    assert (decision.sparse, decision.code) == (True, "not_measured")
    assert "esparse-trt tune" in decision.reason


def test_above_the_last_bucket_its_row_speaks():
    table = make_table(row(BUCKETS[-1], 400.0, 500.0))
    assert decide(table, 4096, 4096, "float16", [20000]).code == "faster"


def test_the_tokens_of_a_recipe_are_its_profiles_optima():
    assert tuning.profile_tokens(EngineSection()) == [1, 512]


# --- the search --------------------------------------------------------------------------------------------

TIMES = {  # microseconds of each candidate as a function of M
    "decode_fast": lambda m: 7.0 + 0.1 * m,
    "decode_close": lambda m: 7.2 + 0.2 * m,
    "wide": lambda m: 40.0 + 0.02 * m,
    "reference": lambda m: 900.0 * m,
}


class Library:
    """Stands for `Kernels`."""

    version, kernel_set = "0.1.0", "abc123"
    candidates = tuple(TIMES)

    def supporting(self, problem: Problem, gpu):
        return [name for name in TIMES if problem.m <= 16 or not name.startswith("decode")]


class PlayedLayer(tune.Layer):
    """A layer whose replays are only (candidate, M)."""

    def __init__(self, kernels, gpu, n, k, dtype, rows):
        self.kernels, self.gpu, self.n, self.k, self.dtype = kernels, gpu, n, k, dtype
        self._least, self._best = {}, (0, float("inf"))

    def replay(self, m, candidate, **options):
        return candidate, m

    def dense_replay(self, m):
        return "dense", m


@pytest.fixture
def played(monkeypatch):
    """The tuner on played times; yields the names of each `measure`."""
    measured = []

    def measure(contestants, **limits):
        measured.append(list(contestants))
        return {
            name: timing.Timing(*[(TIMES.get(name) or (lambda m: 14.0 + 0.05 * m))(m)] * 3)
            for name, (_, m) in contestants.items()
        }

    class NoStream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "stream", lambda: None)
    monkeypatch.setattr(tune.torch.cuda, "stream", lambda stream: NoStream())
    monkeypatch.setattr(tune, "Layer", PlayedLayer)
    return measured


def test_the_fastest_candidate_wins_each_cell_and_only_close_ones_are_timed_again(played, tmp_path):
    table = make_table()
    tune.tune(Library(), table, tmp_path / "t.json", [(4096, 4096)], tokens=(1, 16, 64))
    found = {m: table.rows[4096, 4096, "float16", m].candidate for m in (1, 16, 64)}
    assert found == {1: "decode_fast", 16: "decode_fast", 64: "wide"}
    assert table.rows[4096, 4096, "float16", 1].dense_us == pytest.approx(14.05)
    assert ["decode_fast", "decode_close", "dense"] in played
    assert ["wide", "dense"] in played
    assert not any("reference" in names for names in played)


def test_a_candidate_that_cannot_win_waits_for_a_larger_m(played, tmp_path):
    tune.tune(Library(), make_table(), tmp_path / "t.json", [(64, 64)], tokens=(1, 2, 16, 64))
    quick = [names for names in played if "dense" not in names]
    assert quick[0] == ["decode_fast", "decode_close", "wide"]
    assert quick[1] == ["decode_fast", "decode_close"]  # wide took 40 us at M = 1, twice 7.1 us is enough
    assert quick[2] == ["decode_fast", "decode_close", "wide"]  # at 8 times the tokens it might
    assert quick[3] == ["wide"]


def test_a_tuner_that_was_stopped_goes_on_where_it_was(played, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    saves = []
    save = Table.save

    def save_twice(table, path):
        save(table, path)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Table, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(Library(), make_table(), path, [(64, 64), (128, 64)], tokens=(1, 16))
    assert [r["m"] for r in json.loads(path.read_text())["rows"]] == [1, 16]
    played.clear()
    table = tune.open_table(path, Library(), H100)
    tune.tune(Library(), table, path, [(64, 64), (128, 64)], tokens=(1, 16))
    assert len(played) == 2 * 2
    assert len(load_table(path).rows) == 4


def test_the_reference_is_timed_where_nothing_else_runs(played, tmp_path, monkeypatch):
    monkeypatch.setattr(Library, "supporting", lambda self, problem, gpu: ["reference"])
    table = make_table()
    tune.tune(Library(), table, tmp_path / "t.json", [(64, 64)], tokens=(1,))
    assert table.rows[64, 64, "float16", 1].candidate == "reference"


# --- which layers, and the command -------------------------------------------------------------------------


def test_layers_that_read_the_same_tensor_are_one_gemm():
    shapes = tuning.layer_shapes(load_recipe(QUICKSTART), None)
    assert {shape: names[0] for shape, names in shapes.items()} == {
        (512, 256): "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        (256, 256): "model.layers.0.self_attn.o_proj",
        (1536, 256): "model.layers.0.mlp.gate_proj+up_proj",
        (256, 768): "model.layers.0.mlp.down_proj",
    }
    assert all(len(names) == 6 for names in shapes.values())


def test_layers_that_would_not_be_packed_are_not_measured(tiny_recipe):
    shapes = tuning.layer_shapes(load_recipe(tiny_recipe), None)
    assert list(shapes) == [(64, 128)]  # padded metadata makes those with K = 64 too large


def test_no_recipe_and_no_shape_is_an_error():
    with pytest.raises(EsparseError, match="which layers"):
        tuning.layer_shapes(None, None)
    with pytest.raises(EsparseError, match="'4096' is not a shape"):
        tuning.parse_shape("4096")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "words"),
    [(4096, 48, "float16", "K = 48"), (64, 64, "float32", "float16 or bfloat16"), (64, 64, "int7", "int7")],
)
def test_what_has_no_kernels_is_refused_before_anything_runs(n, k, dtype, words):
    with pytest.raises(EsparseError, match=words):
        tuning.require_kernels(n, k, dtype)


@pytest.mark.skipif(tune.torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu_or_library_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning.library, "load", Library)
    result = CliRunner().invoke(app, ["tune", "--shape", "4096x4096", "--table", str(tmp_path / "t.json")])
    assert result.exit_code == 2
    assert "tuning needs an NVIDIA GPU" in result.output
    monkeypatch.undo()
    monkeypatch.setenv("ESPARSE_LIBRARY_DIR", str(tmp_path))
    tuning.library.load.cache_clear()
    result = CliRunner().invoke(app, ["tune", "--shape", "4096x4096"])
    assert result.exit_code == 2
    assert "libesparse_kernels.so was not found" in result.output
    assert not (tmp_path / "t.json").exists()
